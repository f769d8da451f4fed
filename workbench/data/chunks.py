"""Rows read and decoded ahead of the work that is done with their pairs, a chunk at a time and in order."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

from workbench.common.processes import cores
from workbench.data.rows import Pair, Rows, decode, kind_of

T = TypeVar("T")
#: What became of each row of a chunk, with the pairs of those that count, and the state from which the next is read.
Decoded: TypeAlias = tuple[list[tuple[str, Pair | None]], Mapping[str, Any] | None]
AHEAD = 2  #: chunks decoded ahead


class Reading(NamedTuple):
    """How a row is decoded, in the order in which `rows.decode` takes it.

    Attributes:
        scores: beginning of the names of the columns that hold the images' scores; empty = none are read.
        resize: filter by which images are resized.
        crop: where the square is cut from an image that is none.
    """

    scores: str = ""
    resize: str = "bicubic"
    crop: str = "center"


AS_IS = Reading()  #: no scores, the usual resizing and crop


def decoded(
    rows: Rows,
    resolution: int,
    size: int,
    done: int = 0,
    state: Mapping[str, Any] | None = None,
    workers: int = 0,
    reading: Reading = AS_IS,
    mine: Callable[[list], list] = lambda rows: rows,
) -> Iterator[Decoded]:
    """What became of rows and the pairs of those that count, in order; a chunk at a time, decoded ahead on threads.

    Args:
        done, state: as `Rows.chunks` takes them.
        mine: those of a chunk's rows that are this process's.
    """
    threads = workers or cores()
    with ThreadPoolExecutor(threads) as pool:

        def begun(row: Mapping[str, Any]) -> tuple[str, Future | None]:
            # By a row's columns, before its images are decoded: what does not count costs nothing.
            kind = kind_of(row, reading.scores)
            return kind, pool.submit(decode, row, resolution, *reading) if kind == "used" else None

        chunks = (([begun(row) for row in mine(chunk)], after) for chunk, after in rows.chunks(size, done, state))
        # In order: threads finish in any, but the pairs' order is that of the rows.
        for chunk, after in lagging(chunks, AHEAD):
            pairs = [(kind, future.result() if future else None) for kind, future in chunk]
            yield [("undecodable" if kind == "used" and pair is None else kind, pair) for kind, pair in pairs], after


class Chunk(NamedTuple):
    """Rows that were read together.

    Attributes:
        pairs: of those that count.
        counts: of all rows up to the last of these, by what became of them.
        state: from which the next row is read.
        last: whether no more rows are wanted.
    """

    pairs: list[Pair]
    counts: Counter
    state: Mapping[str, Any] | None
    last: bool


def counted(read: Iterable[Decoded], counts: Counter, limit: int) -> Iterator[Chunk]:
    """What `decoded` yields, with the rows counted, up to the limit.

    Args:
        counts: of the rows before; left as it is.
        limit: pairs that count; 0 = all.
    """
    for found, state in read:
        counts, pairs = counts.copy(), []
        for kind, pair in found:
            # Rows beyond the limit are not counted, as if the data had ended here.
            if limit and counts["used"] >= limit:
                break
            counts[kind] += 1
            pairs += [pair] if pair else []
        full = bool(limit) and counts["used"] >= limit
        yield Chunk(pairs, counts, state, full)
        if full:
            return


def lagging(items: Iterable[T], behind: int) -> Iterator[T]:
    """The same items in the same order, each once so many later ones have been taken: work that was begun goes on."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        # Bounded, since decoded images wait in memory.
        if len(waiting) > behind:
            yield waiting.popleft()
    yield from waiting
