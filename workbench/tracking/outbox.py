"""What a run logs, kept on disk until the tracking store has accepted it.

One folder a run, under `outbox` in the state folder:

| file | content |
| --- | --- |
| `journal.jsonl` | every record, one line each, appended in a single write |
| `files/` | the files that records refer to |
| `taken` | how many bytes of the journal the store has accepted |
| `refused.jsonl` | records that the store rejected |
| `lock` | held by the process that delivers |
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from filelock import FileLock, Timeout

from workbench.common.errors import Failure
from workbench.common.files import in_place
from workbench.common.paths import state_path
from workbench.common.reading import require_regular

Record = dict[str, Any]  # "kind", "time" in milliseconds, and the fields of that kind
METRICS = "metrics"
LIMIT = 1000  #: metric values that MLflow accepts in one request

_encode = json.JSONEncoder(default=float, separators=(",", ":")).encode  # numpy's numbers too; NaN and Infinity pass


class Outbox:
    """The outbox of one run. The process that owns the run appends records; whoever holds its lock delivers them.

    Attributes:
        delivering: kind of the records that are being delivered, or were last.
        refused: why the store rejected something; empty if it has not.
    """

    def __init__(self, run_id: str):
        self.run_id, self.folder, self.delivering = run_id, state_path("outbox", run_id), ""
        self.refused = ""
        self._journal, self._files = self.folder / "journal.jsonl", self.folder / "files"
        self._accepted, self._rejects = self.folder / "taken", self.folder / "refused.jsonl"
        self._lock = FileLock(self.folder / "lock", thread_local=False)  # acquired by one thread, released by another
        self._append = threading.Lock()
        self._stream: IO[bytes] | None = None

    def open(self) -> None:
        """Start the outbox of a new run and lock it for this process.

        Raises:
            Failure: the disk is full or not writable.
        """
        with self._disk_errors():
            self._files.mkdir(parents=True, exist_ok=True)
            # Others look for journals. The lock comes first, or one of them could deliver from a live run's outbox.
            self.acquire()
            self._require_regular()
            # Unbuffered: once `write` returns, the system has the line, and a kill of this process cannot lose it.
            self._stream = self._journal.open("ab", buffering=0)

    def acquire(self) -> bool:
        """Lock the outbox for delivery; False where another process holds it, as a live run does."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def add(self, kind: str, **fields: Any) -> None:
        """Append a record. Once this returns, the record survives the process.

        Raises:
            Failure: the disk is full or not writable.
        """
        assert self._stream is not None
        line = (_encode({"kind": kind, "time": time.time_ns() // 1_000_000, **fields}) + "\n").encode()
        with self._append, self._disk_errors():
            size = os.fstat(self._stream.fileno()).st_size
            try:
                # On a disk that is nearly full the system may accept the beginning of a line without an error.
                if self._stream.write(line) < len(line):
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
            except OSError:
                with suppress(OSError):
                    self._stream.truncate(size)  # or the next record would be glued to half of this one
                raise

    @contextmanager
    def file(self, kind: str, name: str, **fields: Any) -> Iterator[Path]:
        """Where to write a file, or a folder, of this name; then a record that refers to it is appended.

        Raises:
            Failure: the disk is full or not writable.
        """
        with self._disk_errors():
            path = self._files / uuid4().hex / name
            path.parent.mkdir()
            yield path
        # After the file: a kill in between leaves a file that no record names, which goes with the folder. A record
        # without its file could never be delivered.
        self.add(kind, file=str(path.relative_to(self.folder)), **fields)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Errors of the disk become one line that names the folder and the remedy."""
        try:
            yield
        except OSError as error:
            raise Failure(
                f"{self.folder}: what the run logs cannot be kept ({error}); free some space, or set WORKBENCH_STATE "
                "to a folder on another disk"
            ) from None

    def _require_regular(self) -> None:
        """Make sure that nothing else is in the journal's place, before it is opened; it need not be there.

        Raises:
            UserError: something else is.
        """
        if self._journal.exists():
            require_regular(self._journal, str(self.folder))

    def path(self, record: Record) -> Path:
        """Path of the file or folder that a record refers to."""
        return self.folder / record["file"]

    @property
    def accepted(self) -> int:
        """Bytes of the journal that the store has accepted."""
        return int(self._accepted.read_text("utf-8")) if self._accepted.exists() else 0

    @property
    def waiting(self) -> bool:
        """Whether there is a record that the store has not accepted."""
        return any(True for _ in self._lines())

    def _lines(self) -> Iterator[bytes]:
        """Journal lines that the store has not accepted, without an unfinished one that a dying process left."""
        self._require_regular()
        with suppress(FileNotFoundError), self._journal.open("rb") as lines:
            lines.seek(self.accepted)
            yield from (line for line in lines if line.endswith(b"\n"))

    def batches(self) -> Iterator[list[Record]]:
        """Waiting records: metrics in batches of up to 1000 values, records of other kinds one by one.

        A batch counts as accepted when the next one is requested. The caller marks a rejected record by a key
        "refused" with the reason; such records are moved to `refused.jsonl`.
        """
        batch: list[Record] = []
        values, end = 0, self.accepted
        for line in self._lines():
            record = _parse(line)
            # LIMIT fills a batch by itself, so that a record of another kind travels alone and in order.
            more = len(record["values"]) if record["kind"] == METRICS else LIMIT
            if batch and values + more > LIMIT:
                yield from self._deliver(batch, end)
                batch, values = [], 0
            batch.append(record)
            values, end = values + more, end + len(line)
        if batch:
            yield from self._deliver(batch, end)

    def _deliver(self, batch: list[Record], end: int) -> Iterator[list[Record]]:
        self.delivering = batch[0]["kind"]
        yield batch
        refused = [record for record in batch if "refused" in record]
        if refused:
            self.refused = self.refused or refused[0]["refused"]
            # Before the mark: a kill in between writes them twice, the other order would lose them.
            with self._rejects.open("a", encoding="utf-8") as stream:
                stream.writelines(_encode(record) + "\n" for record in refused)
        # First the mark that the batch is accepted, then its files go: a kill in between leaves files that nobody
        # needs. In the other order, a record could be delivered again after its file is gone.
        with in_place(self._accepted) as partial:
            partial.write_text(str(end), encoding="utf-8")
        for record in batch:
            # A rejected record keeps its file, since it may be the only copy of what the run logged.
            if "file" in record and "refused" not in record:
                shutil.rmtree(self.path(record).parent, ignore_errors=True)

    def close(self) -> None:
        """Release the lock. Where nothing waits, the outbox is removed, apart from rejected records."""
        if self._stream is not None:
            self._stream.close()
        if not self.waiting:
            # First the journal, by which others find outboxes: what a kill leaves behind is then never taken for one.
            self._journal.unlink(missing_ok=True)
            if not self._rejects.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
        # Last: no other process may deliver from the outbox while it is being removed.
        self._lock.release()


def _parse(line: bytes) -> Record:
    """A journal line as a record; a damaged line becomes a record of a kind that no store accepts."""
    try:
        record: Record = json.loads(line)
        return {"kind": record["kind"], "values": {}} | record
    except (ValueError, KeyError, TypeError):
        return {"kind": "damaged", "line": line.decode(errors="replace")}


def outboxes() -> list[Outbox]:
    """All outboxes in the state folder, of live runs too; a folder with something else for a journal is none."""
    journals = sorted(state_path("outbox").glob("*/journal.jsonl"))
    return [Outbox(path.parent.name) for path in journals if path.is_file()]
