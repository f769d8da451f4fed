"""Caption dropout: training pairs of which some lose their caption, as classifier-free guidance needs it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Generator, Tensor

from workbench.common import distributed
from workbench.common.cache import cached, digest
from workbench.data.pairs import Batch
from workbench.models import Backend


def empty_caption(backend: Backend) -> dict[str, Tensor]:
    """Embeddings of the empty caption by name, each (1, ...), on the CPU; encoded once and kept on disk."""
    key = digest("empty-caption", backend.PIPELINE, backend.digest(*backend.ENCODERS))
    return cached("caption", key, lambda: {name: x.cpu() for name, x in backend.encode_text([""]).items()})


def drop_captions(
    batches: Iterator[Batch],
    empty: Mapping[str, Tensor],
    *,
    share: float,
    size: int,
    generator: Generator,
    skip: int = 0,
) -> Iterator[Batch]:
    """Batches in which a share of the pairs has the empty caption; winner and loser of a pair alike.

    Args:
        batches: of this process.
        empty: embeddings of the empty caption by name, (1, ...).
        share: of the pairs, 0 to 1; each pair is drawn anew each time that it is seen.
        size: pairs of a batch on each process.
        generator: CPU generator, alike on all processes, which draw for the batch of all of them.
        skip: batches that an earlier part of the run has seen.
    """
    for _ in range(skip):
        # Drawn and thrown away, so that the generator stands where it would without the stop.
        _drawn(size, share, generator)
    for batch in batches:
        dropped = _drawn(size, share, generator).to(batch.x_w.device)
        condition = dict(batch.condition)
        for name, value in empty.items():
            kept = condition[name]
            at = dropped.view(-1, *[1] * (kept.ndim - 1))
            condition[name] = torch.where(at, value.to(kept.device, kept.dtype), kept)
        yield batch._replace(condition=condition)


def _drawn(size: int, share: float, generator: Generator) -> Tensor:
    """Which pairs of this process lose their caption in the next batch, (size,), bool."""
    together = torch.rand(size * distributed.world(), generator=generator) < share
    return together[distributed.part_of(size)]
