"""A trained model's folder: empty or whole, and known as the run's own, whenever the run is killed."""

import json
import os
import shutil
from pathlib import Path

from workbench.common.cache import digest
from workbench.common.errors import Failure, UserError
from workbench.common.files import in_place, noted
from workbench.common.validation import writable_folder
from workbench.training.config import Config
from workbench.training.snapshots import PLACED, is_definite


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
        has_model: whether an earlier start has put the whole model there.
        beside: where the model is to be written, for `place` to move it.
    """

    def __init__(self, path: Path, state: Path | None, config: Config, *, known: bool = True):
        settings = {key: value for key, value in config.flat().items() if is_definite(key)}
        # Not `path.resolve`, which raises over a link to itself; `require_free` says what is wrong with that.
        self.path, self._given, self._note = Path(os.path.realpath(path)), path, state and state / PLACED
        self._content = {"folder": str(self.path), "settings": digest(settings)}
        first, again = (self._partial(digest(state and state.resolve(), which)) for which in ("first", "again"))
        # The note is older than the move, and the move is one call of the system. So what is noted is there, whole,
        # as soon as it is no longer beside.
        self.has_model = known and self._noted() == self._content and not first.exists() and _holds_something(self.path)
        # What is written a second time has another name, so that another kill does not make the first look unmoved.
        self.beside = again if self.has_model else first

    def _partial(self, key: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{key[:32]}.partial")

    def _noted(self) -> object:
        try:
            return json.loads((noted(self._note) if self._note else None) or "null")
        except ValueError:
            return None

    def require_free(self, option: str) -> None:
        """Make sure that the model can be put there.

        Args:
            option: by which the folder was given.
        Raises:
            UserError: there is something else in the folder, or it cannot be written.
        """
        if any(writable_folder(option, self._given).iterdir()) and not self.has_model:
            raise UserError(f"{option} {self._given}: not an empty folder; choose a new one")

    def clear(self) -> None:
        """Remove what a killed process has left beside; to be called by the one that holds the run's lock."""
        shutil.rmtree(self.beside, ignore_errors=True)

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
                    partial.write_text(json.dumps(self._content) + "\n", encoding="utf-8")
            os.replace(self.beside, self.path)
        except OSError as error:
            raise Failure(f"{self.path}: the trained model cannot be put there ({error.strerror})") from None


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
