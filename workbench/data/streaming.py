"""Preference pairs without a store: decoded and encoded each time they are read."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from workbench.common import distributed
from workbench.common.cache import digest
from workbench.common.errors import UserError
from workbench.data.chunks import decoded
from workbench.data.encoding import Encoding, gaps_of, in_memory, key_of, latents_of, mirrored
from workbench.data.pairs import Batch, EncodedPairs
from workbench.data.rows import Pair, Rows, kind_of, report
from workbench.models import Backend

log = logging.getLogger(__name__)


@dataclass
class StreamedPairs:
    """Pairs that are decoded and encoded each time they are read: nothing is kept, an epoch costs what the first did.

    Rows are shuffled within a buffer of `buffer` rows, anew each epoch.
    """

    rows: Rows
    backend: Backend
    encoding: Encoding
    buffer: int = 1000
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)

    @property
    def digest(self) -> str:
        """Digest of everything that the pairs depend on: rows, models and how they are encoded."""
        key = key_of(self.rows, self.backend, self.encoding)
        return digest(key, {name: x.tolist() for name, x in self.fixed.items()}) if self.fixed else key

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent, (C, H, W)."""
        return self.sample(1).shape

    def sample(self, count: int) -> EncodedPairs:
        """The first `count` pairs, encoded in memory."""
        return in_memory(self.rows, self.backend, replace(self.encoding, limit=count, flip=False)).with_condition(
            self.fixed
        )

    def with_condition(self, fixed: Mapping[str, Tensor]) -> "StreamedPairs":
        """The same pairs, with parts of the condition that are alike for all of them in place of what each has.

        Args:
            fixed: by name, each (...), without a batch dimension.
        """
        return replace(self, fixed=fixed)

    def batches(self, size: int, generator: Generator, device: torch.device, skip: int = 0) -> Iterator[Batch]:
        """Endless batches of this process.

        Args:
            skip: leave out so many first ones, which an earlier part of the run has seen; they are decoded again, since
                only that tells which rows count, but not encoded.
        Raises:
            UserError: no row of the data counts.
        """
        waiting: list[Pair] = []
        rows = self.rows.stream()
        # By the columns alone: rows are shared out undecoded, so every process must know which ones count.
        usable = rows.dataset.filter(lambda row: kind_of(rows.layout.row(row), self.encoding.scores) == "used")
        if self.encoding.limit:
            # Before shuffling: the limit means the first rows, as in an encoded store, in every epoch.
            usable = usable.take(self.encoding.limit)
        # Not anew each epoch: batches run on over an epoch's end, and so do the turns.
        turns = Turns(size)
        while True:
            seed = int(torch.randint(2**31, (), generator=generator))
            # Of its own: processes decode different numbers of pairs, and must all shuffle the next epoch alike.
            coin = Generator().manual_seed(seed + distributed.rank())
            epoch = replace(rows, dataset=usable.shuffle(seed=seed, buffer_size=self.buffer))
            self.counts.clear()
            for found, _ in decoded(epoch, self.backend.resolution, size, reading=self.encoding.reading, mine=turns):
                self.counts.update(kind for kind, _ in found)
                pairs = [pair for _, pair in found if pair]
                if flip := self.encoding.flip:
                    # By chance, where a store holds all ways: nothing is kept here, and each epoch draws anew.
                    sides = torch.rand(len(pairs), 2, generator=coin) < 0.5
                    ways = sides if flip == "independent" else sides[:, :1].expand(-1, 2)
                    pairs = [mirrored(p, *way) for p, way in zip(pairs, ways.tolist(), strict=True)]
                waiting += pairs
                while len(waiting) >= size:
                    batch, waiting = waiting[:size], waiting[size:]
                    if skip:
                        skip -= 1
                    else:
                        yield self._batch(batch, device)
            # Otherwise an endless loop over rows of which none makes a batch.
            if not self.counts["used"]:
                raise UserError(f"{self.rows.key}: no usable row ({report(self.counts)})")
            if self.counts["undecodable"]:
                log.warning("%s: %s", self.rows.key, report(self.counts))

    def _batch(self, pairs: Sequence[Pair], device: torch.device) -> Batch:
        """Pairs encoded now, as a batch on the device."""
        tensors = latents_of(pairs, self.backend)
        text = self.backend.encode_text([p.caption for p in pairs])
        condition = {name.partition(".")[2]: x for name, x in tensors.items() if "." in name} | text
        condition |= {name: x.expand(len(pairs), *x.shape) for name, x in self.fixed.items()}
        return Batch(
            tensors["x_w"].to(device),
            tensors["x_l"].to(device),
            {k: v.to(device).float() for k, v in condition.items()},
            gaps_of(pairs).to(device) if self.encoding.scores else None,
        )


@dataclass
class Turns:
    """Which rows are this process's: of every batch of all processes its own `size`."""

    size: int
    seen: int = 0

    def __call__(self, rows: list) -> list:
        """This process's rows of the next ones, `rows`, which follow those of the call before."""
        together, part = self.size * distributed.world(), distributed.part_of(self.size)
        first, self.seen = self.seen, self.seen + len(rows)
        return [row for i, row in enumerate(rows, first) if part.start <= i % together < part.stop]
