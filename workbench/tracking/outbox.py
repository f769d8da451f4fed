"""What a run tells, kept on disk until the tracking store has taken it.

A folder a run, under `outbox` in the state folder: `journal.jsonl`, to which every record is added in one piece;
`files`, of which records speak; `taken`, how much of the journal the store has; `refused.jsonl`, what the store did
not want; `lock`, held by the process that delivers.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from workbench.common.errors import Failure
from workbench.common.paths import state

Record = dict[str, Any]  # its "kind", its "time" in milliseconds, and what the kind needs
METRICS = "metrics"
LIMIT = 1000  # values that MLflow takes at once

_encode = json.JSONEncoder(default=float, separators=(",", ":")).encode  # numpy's numbers too; NaN and Infinity pass


class Outbox:
    """One run's: the process whose run it is adds records; whoever holds its lock delivers them, in order.

    Attributes:
        handing: kind of the records that are being delivered, or were last.
        refused: why the store did not want something, if so, which was put aside.
    """

    def __init__(self, run_id: str):
        self.run_id, self.folder, self.handing = run_id, state("outbox", run_id), ""
        self.refused = ""
        self._journal, self._files, self._taken = (self.folder / name for name in ("journal.jsonl", "files", "taken"))
        self._aside = self.folder / "refused.jsonl"
        self._lock = FileLock(self.folder / "lock", thread_local=False)  # taken by one thread, let go of by another
        self._adding = threading.Lock()
        self._stream: IO[bytes] | None = None

    def open(self) -> None:
        """Begin a new one, which is this process's.

        Raises:
            Failure: the disk is full or cannot be written.
        """
        with self._kept():
            self._files.mkdir(parents=True, exist_ok=True)
            self.take()  # before there is a journal, which is what others look for
            self._stream = self._journal.open("ab", buffering=0)

    def take(self) -> bool:
        """Make it this process's to deliver from; False where another process, or a live run, has it."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def add(self, kind: str, **fields: Any) -> None:
        """Add a record; from then on it outlives the process.

        Raises:
            Failure: the disk is full or cannot be written.
        """
        assert self._stream is not None
        line = (_encode({"kind": kind, "time": time.time_ns() // 1_000_000, **fields}) + "\n").encode()
        with self._adding, self._kept():
            size = os.fstat(self._stream.fileno()).st_size
            try:
                if self._stream.write(line) < len(line):
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
            except OSError:
                with suppress(OSError):
                    self._stream.truncate(size)  # no half of a line in front of the next
                raise

    @contextmanager
    def file(self, kind: str, name: str, **fields: Any) -> Iterator[Path]:
        """Where to write a file, or a folder, of this name; then a record that speaks of it is added.

        Raises:
            Failure: the disk is full or cannot be written.
        """
        with self._kept():
            path = Path(tempfile.mkdtemp(dir=self._files)) / name
            yield path
        self.add(kind, file=str(path.relative_to(self.folder)), **fields)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Failure(
                f"{self.folder}: what the run tells cannot be kept ({error}); free some space, or set WORKBENCH_STATE "
                "to a folder on another disk"
            ) from None

    def path(self, record: Record) -> Path:
        """Of the file or folder that a record speaks of."""
        return self.folder / record["file"]

    @property
    def taken(self) -> int:
        """Bytes of the journal that the store has."""
        return int(self._taken.read_text()) if self._taken.exists() else 0

    @property
    def waiting(self) -> bool:
        """Whether there is anything that the store does not have."""
        return any(True for _ in self._lines())

    def _lines(self) -> Iterator[bytes]:
        """Those that the store does not have, but for half a one, which a process was writing when it died."""
        with suppress(FileNotFoundError), self._journal.open("rb") as lines:
            lines.seek(self.taken)
            yield from (line for line in lines if line.endswith(b"\n"))

    def batches(self) -> Iterator[list[Record]]:
        """What waits: records of metrics by up to 1000 values, any other alone.

        A batch counts as taken once the next is asked for; records that got a key "refused", saying why, are put aside.
        """
        batch: list[Record] = []
        values, end = 0, self.taken
        for line in self._lines():
            record = _parse(line)
            more = len(record["values"]) if record["kind"] == METRICS else LIMIT
            if batch and values + more > LIMIT:
                yield from self._hand(batch, end)
                batch, values = [], 0
            batch.append(record)
            values, end = values + more, end + len(line)
        if batch:
            yield from self._hand(batch, end)

    def _hand(self, batch: list[Record], end: int) -> Iterator[list[Record]]:
        self.handing = batch[0]["kind"]
        yield batch
        refused = [record for record in batch if "refused" in record]
        if refused:
            self.refused = self.refused or refused[0]["refused"]
            with self._aside.open("a") as stream:
                stream.writelines(_encode(record) + "\n" for record in refused)
        partial = self._taken.with_suffix(".partial")
        partial.write_text(str(end))
        os.replace(partial, self._taken)
        for record in batch:
            if "file" in record and "refused" not in record:
                shutil.rmtree(self.path(record).parent, ignore_errors=True)

    def close(self) -> None:
        """Let go of it; where nothing waits it is removed, but for what was refused."""
        if self._stream is not None:
            self._stream.close()
        if not self.waiting:
            self._journal.unlink(missing_ok=True)
            if not self._aside.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _parse(line: bytes) -> Record:
    """A line of a journal; one that a disk has damaged becomes a record that no store will want."""
    try:
        record: Record = json.loads(line)
        return {"kind": record["kind"], "values": {}} | record
    except (ValueError, KeyError, TypeError):
        return {"kind": "damaged", "line": line.decode(errors="replace")}


def outboxes() -> list[Outbox]:
    """All that there are, of live runs too."""
    return [Outbox(path.parent.name) for path in sorted(state("outbox").glob("*/journal.jsonl"))]
