"""Snapshots of an unfinished run, from which it resumes to the same bits; not to be shared, unlike checkpoints.

A snapshot is one file, written aside and moved into place, whose name holds the step and the SHA-256 of its contents: a
torn or damaged file does not match its name. It holds tensors and plain values alone and is read as such, so that a
pickle under a snapshot's name is never run.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, NamedTuple

import torch

from workbench.common.errors import Failure, UserError, one_line, pass_on_interrupt
from workbench.common.files import in_place, is_partial, noted, partial_file, require_readable, sync, sync_folder

log = logging.getLogger(__name__)
SUFFIX = ".snapshot"
PATTERN = "[0-9]" * 8 + f"-*{SUFFIX}"
FINISHED = "finished.json"
PLACED = "model.json"  #: which folder the trained model has been moved to (`model_folder`)
#: Settings that decide nothing about the weights, so that a resumed run may have others.
FREE = frozenset({"train.max_hours", "train.checkpoint_every", "train.checkpoints_kept"})
#: Schedules of the learning rate that know no end: with these a run may be resumed to more steps than it had.
UNENDING = ("warmup", "constant", "constant_with_warmup")


class Snapshot(NamedTuple):
    """An unfinished run between two steps.

    Attributes:
        step: how many steps are done.
        state: of training, as `Training.state` returns it.
        events: what the run has reported so far, as a `Recorder` keeps it.
        settings: resolved, by dotted name.
        data: digests of what it learns from and starts with.
    """

    step: int
    state: Mapping[str, Any]
    events: Sequence[tuple] = ()
    settings: Mapping[str, Any] = {}
    data: Sequence[str] = ()


class Finished(NamedTuple):
    """How a run was made that has come to its end.

    Attributes:
        steps: how many it has.
        settings: resolved, by dotted name, as JSON has them.
        output: where its model was saved, an absolute path; empty if it was not.
    """

    steps: int
    settings: Mapping[str, Any]
    output: str = ""


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one run.

    Attributes:
        folder: where they are written.
        interval: steps between them; 0 = only when the run is stopped.
        keep: how many of the newest stay.
        before: folders of earlier attempts at the same run, whose snapshots are read too.
    """

    folder: Path
    interval: int = 0
    keep: int = 2
    before: Sequence[Path] = ()

    def due(self, step: int) -> bool:
        """Whether a snapshot is to be taken after this step."""
        return self.interval > 0 and step % self.interval == 0

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, then remove the oldest beyond `keep`.

        Raises:
            Failure: the disk is full or cannot be written; earlier snapshots are untouched.
        """
        step, met = snapshot.step, list[OSError]()
        content = {**snapshot.state, "events": list(snapshot.events)}
        content |= {"settings": dict(snapshot.settings), "data": list(snapshot.data)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The final name holds the digest, which is known when all is written: hence a partial file, then a rename.
            with partial_file(self.folder / f"{step}") as partial:
                with partial.open("wb") as stream:
                    hashing = _Hashing(stream, met)
                    torch.save(content, hashing)  # type: ignore[arg-type]
                    # The contents must be on the disk before the name: after a loss of power, a file that has its name
                    # would otherwise be empty.
                    sync(stream)
                os.replace(partial, self.folder / f"{step:08d}-{hashing.digest}{SUFFIX}")
                sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            # An interrupt inside torch.save comes out as a RuntimeError and must not be reported as a failed disk.
            pass_on_interrupt(error)
            kept = self.steps()
            last = f"that of step {kept[0]} is untouched" if kept else "there is none before it"
            reason = met[0] if met else error
            raise Failure(f"{self.folder}: the snapshot of step {step} cannot be written ({reason}); {last}") from None
        for path in self._paths()[self.keep :]:  # last, so that there is always a whole one
            path.unlink(missing_ok=True)

    def newest(self) -> Snapshot | None:
        """The newest whole snapshot; damaged ones are passed over, with a warning, and removed.

        Raises:
            Failure: this user may not read one.
        """
        for path in self._paths(*self.before):
            require_readable(path, "set WORKBENCH_STATE to another folder to begin anew")
            try:
                return _read(path)
            except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
                log.warning("%s is damaged (%s): going back to the one before", path, one_line(error))
                # Or it would count among the newest that are kept, and a whole one would be removed for it.
                path.unlink(missing_ok=True)
        return None

    def steps(self) -> list[int]:
        """The steps of all snapshots, whole or not, newest first."""
        return [step_of(path) for path in self._paths(*self.before)]

    def discard(self) -> None:
        """Remove all snapshots, those of earlier attempts too: the run has come to its end."""
        for folder in (self.folder, *self.before):
            remove_snapshots(folder)

    def finish(self, finished: Finished) -> None:
        """Note that the run has come to its end; its newest snapshot stays, to go on from to a later end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The note before the removals: a kill in between leaves too many snapshots, not a run that looks unfinished.
        with in_place(self.folder / FINISHED) as partial:
            partial.write_text(json.dumps(finished._asdict()) + "\n", encoding="utf-8")
        for path in self._paths()[1:]:
            path.unlink(missing_ok=True)

    def finished(self) -> Finished | None:
        """What `finish` has noted; None if the run has not come to its end, or has gone on since to a later one."""
        try:
            finished = Finished(**json.loads(noted(self.folder / FINISHED) or "null"))
        except (ValueError, TypeError):
            return None
        steps = self.steps()
        # No snapshot is taken after a run's last step: one at that step or beyond is of a run to a later end.
        return None if steps and steps[0] >= finished.steps else finished

    def _paths(self, *others: Path) -> list[Path]:
        """The snapshot files of this folder and others, newest first."""
        paths = [path for folder in (self.folder, *others) for path in folder.glob(PATTERN) if path.is_file()]
        # Names begin with the step in eight digits, so their order is that of the steps, whichever folder they are in.
        return sorted(paths, key=lambda path: path.name, reverse=True)


def remove_snapshots(folder: Path) -> None:
    """Remove the snapshots of a folder, and the folder unless something else lies in it."""
    for path in snapshot_files(folder):
        path.unlink(missing_ok=True)
    # rmdir refuses a folder that is not empty, which is what is wanted.
    with suppress(OSError):
        folder.rmdir()


def snapshot_files(folder: Path) -> list[Path]:
    """The files that the workbench has written into a folder of snapshots, unfinished ones too."""
    return [p for p in folder.glob("*") if p.match(PATTERN) or p.name in (FINISHED, PLACED) or is_partial(p)]


def step_of(path: Path) -> int:
    """The step after which a snapshot was taken."""
    return int(path.name.partition("-")[0])


def is_definite(setting: str) -> bool:
    """Whether a setting decides what a run's result is; how safely and how long it runs does not."""
    return not setting.startswith("snapshots.") and setting not in FREE


def require_same(stored: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless a snapshot's run had these settings, but for its length and what it leaves on its way.

    The length must be the same where the learning rate falls towards the end.
    """
    free = {"train.steps"} if settings.get("train.schedule") in UNENDING else set()
    names = sorted(name for name in (stored.keys() | settings.keys()) - free if is_definite(name))
    differing = [name for name in names if stored.get(name) != settings.get(name)]
    if differing:
        key = differing[0]
        ends = "; with this train.schedule every step's rate depends on their number" if key == "train.steps" else ""
        raise UserError(
            f"{key} = {settings.get(key)!r}: the snapshot of {where} was made with {stored.get(key)!r} "
            f"({len(differing)} differ){ends}; restore it, or begin anew under another name"
        )


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's global generators. The workbench draws from its own; a user's objective may use these."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put torch's global generators into the states that `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class _Hashing:
    """A binary stream that is hashed as it is written; its errors go into `met`, since torch hides what they say."""

    def __init__(self, stream: IO[bytes], met: list[OSError]):
        self._stream, self._hash, self._met = stream, hashlib.sha256(), met

    def write(self, data: Any) -> int:
        try:
            written = self._stream.write(data)
        except OSError as error:
            self._met.append(error)
            raise
        self._hash.update(data)
        return written

    def flush(self) -> None:
        self._stream.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()[:32]


def _read(path: Path) -> Snapshot:
    """Read a snapshot file.

    Raises:
        ValueError: its contents do not match its name; other errors of torch where it is not such a file.
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
        if digest != path.stem.partition("-")[2]:
            raise ValueError("it does not match the checksum in its name")
        stream.seek(0)
        # Onto the CPU: a snapshot may be resumed where the device has another number, or on a machine without one.
        state = torch.load(stream, map_location="cpu", weights_only=True)
    # Snapshots made before they were called events have them under "told".
    events = state.pop("told") if "told" in state else state.pop("events")
    return Snapshot(step_of(path), state, events, state.pop("settings"), state.pop("data"))
