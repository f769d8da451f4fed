"""A trained model's folder: empty or whole, and known as the run's own, whenever the run is killed."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.common.cache import digest
from workbench.common.errors import Failure, UserError
from workbench.common.files import holds_something, in_place, is_partial, noted, partial_file, remove
from workbench.common.validation import writable_folder
from workbench.training.config import Config, completed
from workbench.training.snapshots import PLACED, is_definite

log = logging.getLogger(__name__)


class ModelFolder:
    """Where a run's model goes once it is trained.

    A kill may come after the model is in its folder and before the run's end is recorded. The run is then started
    again, and must tell its own model from what somebody else has put into the folder.

    Args:
        path: a folder that is empty, or has the model that an earlier start of this run has put there.
        state: the run's folder of snapshots, which outlives a kill; None = the run cannot be started again.
        config: the run's; with other settings it would be another model.
        known: whether the run may have been started before; one that begins anew knows no model.

    Attributes:
        path: as it was given.
        has_model: whether an earlier start has put the whole model there.
    """

    def __init__(self, path: Path, state: Path | None, config: Config, *, known: bool = True):
        # Not `path.resolve`, which raises over a link to itself; `require_free` says what is wrong with that.
        self.path, self._real, self._note = path, Path(os.path.realpath(path)), state and state / PLACED
        self._content = {"folder": str(self._real), "settings": _definite(config.flat())}
        self._first, self._again = (
            self._partial(digest(state and state.resolve(), self._real, which)) for which in ("first", "again")
        )
        before = self._read_note()
        is_same = before.items() >= self._content.items()
        self._known, self._is_noted = known, known and is_same
        self._data = before.get("data") if self._is_noted else None
        # Made by a start of this run with other settings: it may be wanted still.
        self._is_others = bool(before) and before["folder"] == str(self._real) and not is_same
        # The note is older than the move, and the move is one call of the system, which keeps the folder's number. So
        # what is noted is there, whole, as soon as it is no longer beside.
        self.has_model = (
            self._is_noted
            and not self._first.exists()
            and holds_something(self._real)
            and before.get("number") in (None, _number(self._real))
        )

    @property
    def beside(self) -> Path:
        """Where the model is to be written, for `place` to move it."""
        # What is written a second time has another name, so that another kill does not make the first look unmoved.
        return self._again if self.has_model else self._first

    def _partial(self, key: str) -> Path:
        # Names have up to 255 bytes, and what is saved under this one has two partial names of its own.
        name = os.fsencode(self._real.name)[:100].decode(errors="ignore")
        return self._real.parent / f"{name}.{key[:32]}.partial"

    def _read_note(self) -> dict[str, Any]:
        """The folder, settings and data of the model that was put into its folder, or was about to be."""
        try:
            before = json.loads((noted(self._note) if self._note else None) or "{}")
        except ValueError:
            return {}
        if not isinstance(before, dict) or not isinstance(before.get("settings"), dict) or "folder" not in before:
            return {}
        return before | {"settings": _definite(completed(before["settings"]))}

    def require_free(self, option: str) -> None:
        """Make sure that the model can be put there.

        Args:
            option: by which the folder was given.
        Raises:
            UserError: there is something else in the folder, it or the folder around it cannot be written, or nothing
                can be moved to its place.
        """
        writable_folder(option, self.path)
        if holds_something(self._real) and not self.has_model:
            left = f"; the model that this run has trained lies in {self._first}" if self._is_whole_beside() else ""
            raise UserError(f"{option} {self.path}: not an empty folder; choose a new one{left}")
        if self._is_whole_beside() and (self._is_others or not self._known):
            made = ", with other settings" if self._is_others else ""
            remedy = "move it away" if self._is_others or not self._note else "go on with --resume, or move it away"
            raise UserError(
                f"{option} {self.path}: an earlier start of this run has trained a model{made}, which lies in "
                f"{self._first}; {remedy}"
            )
        if self._real == Path.cwd():  # every relative path after the move would lead nowhere
            raise UserError(f"{option} {self.path}: the working folder, which no other can replace; choose one in it")
        if os.path.ismount(self._real):
            raise UserError(
                f"{option} {self.path}: a file system is mounted there, which no folder can replace; choose one in it, "
                f"as {self.path / 'model'}"
            )
        self._try_move(option)

    def _try_move(self, option: str) -> None:
        """Make and move an empty folder as the model will be.

        Raises:
            UserError: that does not work here.
        """
        # Under a name of that kind: whether there may be one is a part of the question.
        with partial_file(self._again) as probe:
            try:
                probe.mkdir()
            except OSError as error:
                raise UserError(
                    f"{option} {self.path}: the model is written beside it first, and {self._real.parent} cannot be "
                    f"written ({error.strerror}); choose a folder elsewhere"
                ) from None
            if self.has_model:  # nothing more is going to be moved
                return
            try:
                shutil.copymode(self._real, probe)
                os.replace(probe, self._real)
            except OSError as error:  # a bind mount, or a folder of somebody else's in one of which only owners remove
                raise UserError(
                    f"{option} {self.path}: no folder can be moved to its place ({error.strerror}); choose another, as "
                    f"{self.path / 'model'}"
                ) from None

    def require_data(self, data: Sequence[str]) -> None:
        """Make sure that a model which is there already was made from the same data; `place` notes them.

        Args:
            data: digests of what the run learns from and starts with.
        Raises:
            UserError: it was made with other data or weights under the same names.
        """
        if self.has_model and self._data not in (None, list(data)):
            raise UserError(f"{self.path}: the model in it was made with other data or weights; choose a new folder")
        self._data = list(data)

    def clear(self) -> None:
        """Remove what a killed process has left beside; to be called by the one that holds the run's lock.

        A whole model, which only had to be moved to its folder, is moved now.

        Raises:
            Failure: it cannot be moved.
        """
        if self._is_noted and self._is_whole_beside():
            self._move()
            self.has_model = True
        own = (self._first.name, self._again.name)
        for left in filter(is_partial, self._real.parent.glob("*.partial")):
            # What was saved whole, and what was being saved, beside which a file shows what the umask says.
            if left.name in own or left.name.startswith(tuple(f"{name}." for name in own)):
                remove(left)

    def place(self) -> None:
        """Move the model from beside into its folder; one that an earlier start has put there stays.

        Raises:
            Failure: it cannot be moved, since something else has been put into the folder.
        """
        if self.has_model:
            self.clear()
            return
        try:
            if self._note:
                self._note.parent.mkdir(parents=True, exist_ok=True)
                with in_place(self._note) as partial:
                    content = self._content | {"data": self._data, "number": _number(self._first)}
                    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        except OSError as error:
            # What has been trained for hours matters more than to know it again after a kill in the next second.
            log.warning("%s: cannot be written (%s)", self._note, error.strerror)
        self._move()

    def _is_whole_beside(self) -> bool:
        """Whether a whole model waits to be moved: what is written under that name is whole at once."""
        return holds_something(self._first)

    def _move(self) -> None:
        try:
            if self._real.is_dir():  # whoever made it may have made it for others too
                shutil.copymode(self._real, self._first)
            os.replace(self._first, self._real)
        except OSError as error:
            raise Failure(
                f"{self.path}: the trained model cannot be put there ({error.strerror}); it lies whole in {self._first}"
            ) from None


def _number(folder: Path) -> list[int]:
    """By which the system knows a folder, whatever it is called."""
    about = os.stat(folder)
    return [about.st_dev, about.st_ino]


def _definite(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide what a model is, as JSON has them, which knows no tuples."""
    return json.loads(json.dumps({name: value for name, value in settings.items() if is_definite(name)}))
