"""Encoded preference pairs as the trainer reads them, in memory or mapped from disk."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from workbench.common import distributed
from workbench.common.cache import digest
from workbench.common.errors import UserError


class Batch(NamedTuple):
    """Pairs on the device.

    Attributes:
        x_w, x_l: latents, (B, C, H, W), float32.
        condition: what the denoiser is given of each pair beside its latents, (B, ...) by name.
        gap: the winner's score minus the loser's, (B,); None where the data's scores are not read.
    """

    x_w: Tensor
    x_l: Tensor
    condition: Mapping[str, Tensor]
    gap: Tensor | None = None


class EncodedPairs:
    """Encoded pairs, in memory or mapped from disk.

    Attributes:
        counts: how many rows were read and what became of them.
        digest: of everything that the tensors depend on: rows, models and how they were encoded.
    """

    def __init__(self, shards: Sequence[Mapping[str, Tensor]], counts: Mapping[str, int], key: str):
        self.shards, self.counts, self.digest = list(shards), dict(counts), key
        self._pairs = _starts([len(s["x_w"]) for s in shards])
        names = [name for name in shards[0] if name.startswith("text.")]
        self._captions = _starts([len(s[names[0]]) for s in shards])
        self.shape = tuple(shards[0]["x_w"].shape[1:])
        self._count = int(self._pairs[-1])
        self._fixed: Mapping[str, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def gather(self, index: Tensor, device: torch.device) -> Batch:
        """The pairs at `index`, (B,), on the device."""
        caption = self._rows("caption", index, self._pairs)
        condition = {
            name.partition(".")[2]: self._rows(
                name, *((caption, self._captions) if name.startswith("text.") else (index, self._pairs))
            )
            for name in self.shards[0]
            if "." in name
        }
        condition |= {name: x.expand(len(index), *x.shape) for name, x in self._fixed.items()}
        found = {name: self._rows(name, index, self._pairs) for name in ("x_w", "x_l")} | condition
        for name, x in found.items():
            # Here and not when a store is opened, which would have to read all of it.
            if not x.isfinite().all():
                raise UserError(
                    f"encoded pairs {self.digest[:12]}: {name} has values that are not finite; encode again"
                )
        x_w, x_l, *rest = (x.to(device, non_blocking=True).float() for x in found.values())
        gap = self._rows("gap", index, self._pairs).to(device) if "gap" in self.shards[0] else None
        return Batch(x_w, x_l, dict(zip(condition, rest, strict=True)), gap)

    def _rows(self, name: str, index: Tensor, starts: Tensor) -> Tensor:
        """Rows of one tensor, counted over all shards, which begin at `starts`."""
        # One call for the whole batch; with several shards, which are mapped from files of their own, row by row.
        if len(self.shards) == 1:
            return self.shards[0][name][index]
        shard = torch.searchsorted(starts, index, right=True) - 1
        places = zip(shard.tolist(), (index - starts[shard]).tolist(), strict=True)
        return torch.stack([self.shards[s][name][i] for s, i in places])

    def batches(self, size: int, generator: Generator, device: torch.device, skip: int = 0) -> Iterator[Batch]:
        """Endless batches of this process, shuffled anew each epoch; a batch may span two epochs.

        Args:
            skip: leave out so many first ones, which an earlier part of the run has seen.
        Raises:
            UserError: fewer pairs than a batch of all processes holds.
        """
        together = size * distributed.world()
        if len(self) < together:
            raise UserError(f"train.batch_size = {size}: only {len(self)} pairs; lower it or give more data")
        order = torch.empty(0, dtype=torch.int64)
        while True:
            while len(order) < together:
                # The rest of an epoch begins the next batch, so that no pair is left out of an epoch.
                order = torch.cat([order, torch.randperm(len(self), generator=generator)])
            index, order = order[:together], order[together:]
            if skip:
                # Shuffled but not read: the generator moves on as it would have.
                skip -= 1
            else:
                # Every process shuffles alike and takes its part, so that no pair is in two parts.
                yield self.gather(index[distributed.part_of(size)], device)

    def first(self, count: int) -> "EncodedPairs":
        """The first `count` of them, or all where there are fewer."""
        if count >= len(self):
            return self
        part = copy.copy(self)
        part._count, part.digest = count, f"{self.digest}-{count}"
        return part

    def with_condition(self, fixed: Mapping[str, Tensor]) -> "EncodedPairs":
        """The same pairs, with parts of the condition that are alike for all of them in place of what is stored.

        Args:
            fixed: by name, each (...), without a batch dimension.
        """
        if not fixed:
            return self
        other = copy.copy(self)
        other._fixed, other.digest = dict(fixed), digest(self.digest, {k: x.tolist() for k, x in fixed.items()})
        return other

    def sample(self, count: int) -> "EncodedPairs":
        """Pairs of which `count` can be drawn: all of them, since any can be had by its number; see `StreamedPairs`."""
        return self


def _starts(sizes: Sequence[int]) -> Tensor:
    """Number of the first row of each shard, and of the one after the last, (shards + 1,)."""
    return torch.tensor([0, *sizes]).cumsum(0)
