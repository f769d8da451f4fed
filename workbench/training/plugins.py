"""Functions of the user's own in place of the workbench's: `reward_scale.shape = "mine.py:late"`.

A section that chooses a function takes FILE.py:FUNCTION or MODULE:FUNCTION too. The function has the form of those
that the section has; its keyword-only arguments become settings. A scorer may be such a function too
(`evaluation.scorers`).

Python code is run only where a user of this machine has named it: in an experiment file, by --set or --scorer, or in
$WORKBENCH_CODE. Settings that come from a study's database never are enough. A setting is kept as
"mine.py:late@0123456789ab", whose end is a digest of the file: a changed file is another setting, so a study does not
go on with other code than it began with, and a folder that was moved is the same.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from workbench.common.errors import UserError, one_line, shown
from workbench.common.reading import near

#: Files and modules that may be run, separated as in $PATH. Worker processes inherit it.
VARIABLE = "WORKBENCH_CODE"
#: A function of the user's own where other texts, such as a folder's path, may stand too.
OWN = re.compile(r"(?:[^:=]+\.py|[\w.]+):(?P<function>\w+)(?:@(?P<digest>[0-9a-f]{12}))?")


def is_plugin(choice: object) -> bool:
    """Whether a choice names a function of the user's own."""
    return isinstance(choice, str) and ":" in choice


def pinned(choice: str, folder: Path, key: str) -> str:
    """A choice that a user has named, with its file's digest; from now on its code may be run.

    Args:
        choice: FILE.py:FUNCTION or MODULE:FUNCTION, perhaps with the digest that it must have.
        folder: from which a file's path counts.
        key: the setting, for messages.
    Raises:
        UserError: there is no such file or module, or it has another digest.
    """
    place, _, function = choice.partition(":")
    function, _, wanted = function.partition("@")
    path = (folder / place).expanduser().resolve() if place.endswith(".py") else None
    digest = _digest(path) if path else _digest(_source(place))
    if digest is None:
        what = f"file ({path}){near(path)}" if path else f"module ({place})"
        raise UserError(f"{key} = {shown(choice)}: no such {what}")
    if wanted and wanted != digest:
        raise UserError(f"{key} = {shown(choice)}: {path or place} has changed since; it is now {digest}")
    allowed = os.environ.get(VARIABLE, "").split(os.pathsep)
    entry = str(path or place)
    os.environ[VARIABLE] = os.pathsep.join(filter(None, dict.fromkeys([entry, *allowed])))
    return f"{path.name if path else place}:{function}@{digest}"


def load(choice: str, key: str) -> Callable:
    """The function that a choice names.

    Args:
        choice: as `pinned` returns it.
        key: the setting, for messages.
    Raises:
        UserError: nobody has named its file here, it fails as it is run, or it has no such function, or one without
            defaults.
    """
    place, _, function = choice.partition(":")
    function, _, digest = function.partition("@")
    module = _module(place, digest)
    if module is None:
        raise UserError(
            f"{key} = {shown(choice)}: code of yours is run only where you name it; name it, or the experiment file "
            f"that does, or set {VARIABLE} to the path of {place}, unchanged"
        )
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{key} = {shown(choice)}: no function {shown(function)} in {place}")
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and (
            parameter.default is parameter.empty or parameter.annotation is parameter.empty
        ):
            raise UserError(f"{key} = {shown(choice)}: its argument {parameter.name} needs a type and a default")
    return found


def _module(place: str, digest: str) -> ModuleType | None:
    """The module with this file's name, or this module's, and digest, among those that the user has named."""
    for entry in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        if place.endswith(".py"):
            path = Path(entry)
            if path.name == place and _digest(path) == digest:
                return _run(path, digest)
        elif entry == place and _digest(_source(place)) == digest:
            try:
                return importlib.import_module(place)
            except Exception as error:  # whatever the user's code raises
                raise _failed(error, _source(place)) from None
    return None


class _FromSource(SourceFileLoader):
    """Runs what a file holds, never byte code of it, which Python takes for current by its size and whole seconds."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


@cache
def _run(path: Path, digest: str) -> ModuleType:
    """Run a file as a module, once in a process."""
    name = f"workbench_plugin_{digest}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path)))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        del sys.modules[spec.name]
        raise _failed(error, path) from None
    return module


def _failed(error: Exception, path: Path | None) -> UserError:
    """The error that says where a file of the user's own failed as it was run: the last of its lines that ran."""
    if isinstance(error, SyntaxError):  # whose text names the line
        return UserError(f"{path}: {one_line(error)}")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path}, line {lines[-1]}" if lines else str(path)
    return UserError(f"{place}: {type(error).__name__}: {one_line(error)}")


def _source(module: str) -> Path | None:
    """The file of a module that can be imported; None where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _digest(path: Path | None) -> str | None:
    """Twelve hexadecimal digits of a file's SHA-256; None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path and path.is_file() else None
