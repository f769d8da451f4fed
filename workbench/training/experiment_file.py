"""Settings as people write them: one TOML file an experiment, and KEY=VALUE on the command line."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.common.errors import UserError, shown
from workbench.common.paths import shipped, shipped_where_missing
from workbench.common.reading import near
from workbench.common.validation import is_place
from workbench.training import plugins
from workbench.training.config import CHOICES, Config, dotted, merge, resolve

#: Settings that may name a file or a folder; in an experiment file their paths count from it.
LOCATED = (
    "model.path", "model.vae", "model.policy", "model.reference", "data.train", "data.validation", "data.prompts",
    "rounds.prompts",
)  # fmt: skip
SCORERS_SETTING = "rounds.scorers"  #: takes functions of the user's own too, as NAME=FUNCTION


def read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a TOML file by dotted name; paths in it are relative to it. The sweep stays one table.

    `extends = "OTHER.toml"` puts them on top of another file's, a key of the sweep as a whole: one beside this file, or
    one of the workbench's own, such as "experiments/default.toml".

    Args:
        extended_by: files on top of this one.
    Raises:
        UserError: the file is missing or not TOML, or extends itself.
    """
    if not path.is_file():
        ours = [f"experiments/{each.name}" for each in shipped("experiments").glob("*.toml")]
        raise UserError(f"experiment {path}: no such file{near(path, ours)}")
    if path.resolve() in extended_by:
        raise UserError(f"experiment {path}: extends itself")
    try:
        # utf-8-sig: some editors begin a file with a byte order mark, which TOML does not allow.
        flat = dotted(tomllib.loads(path.read_text("utf-8-sig")))
    except OSError as error:
        raise UserError(f"experiment {path}: cannot be read ({error.strerror})") from None
    # Before ValueError, of which UserError is a kind; so are errors of TOML and of UTF-8.
    except UserError as error:
        raise UserError(f"experiment {path}: {error}") from None
    except RecursionError:
        raise UserError(f"experiment {path}: not valid TOML (nested too deeply)") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number that Python does not read
        raise UserError(f"experiment {path}: not valid TOML ({error})") from None
    for name in LOCATED:
        value = flat.get(name)
        # A name that is nothing beside the file stays as it is: a path from the working folder, or a hub id.
        place, colon, part = value.partition(":") if isinstance(value, str) else ("", "", "")
        if place and place != "embedded" and is_place(place) and (path.parent / place).exists():
            flat[name] = f"{(path.parent / place).resolve()}{colon}{part}"
    flat = _pinning_plugins(flat, path.parent)
    if "extends" not in flat:
        return flat
    base = flat.pop("extends")
    if not isinstance(base, str):
        raise UserError(f"experiment {path}: extends = {shown(base)}: expected the name of another experiment file")
    # The workbench's own files are found from everywhere, as on the command line.
    file = shipped_where_missing(path.parent / base, base)
    return merge(read(file, (*extended_by, path.resolve())), flat)


def _pinning_plugins(flat: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that a user has named, in which functions of the user's own carry their file's digest.

    Args:
        folder: from which paths count.
    Raises:
        UserError: there is no such file.
    """
    selectors = {f"{section}.{selector}" for section, (selector, _, _) in CHOICES.items()}

    def with_digests(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):  # an arm's settings, or a dimension's choices
            return {inner: with_digests(inner if inner in selectors else key, entry) for inner, entry in value.items()}
        if isinstance(value, list):
            return [with_digests(key, entry) for entry in value]
        if key == SCORERS_SETTING and isinstance(value, str):
            name, _, source = value.rpartition("=")
            own = plugins.OWN.fullmatch(source)
            return f"{name or own['function']}={plugins.pinned(source, folder, key)}" if own else value
        return plugins.pinned(value, folder, key) if key in selectors and plugins.is_plugin(value) else value

    return {key: with_digests(key, value) for key, value in flat.items()}


def parse_override(text: str) -> tuple[str, Any]:
    """A command line's KEY=VALUE; the value is read as TOML, or else is a string.

    Raises:
        UserError: there is no '='.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as reference.interval=16")
    return name, _pinning_plugins({name: _read_value(value)}, Path())[name]


def _read_value(text: str) -> Any:
    """The value in the text of an override."""
    try:
        # Read as one TOML line, so that a value is written as in a file; a bare word is no TOML and is taken as text.
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text  # a second line would be another setting


def load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """An experiment file's settings (or the defaults) with overrides on top, checked."""
    return resolve(merge(read(path) if path else {}, overrides or {}))
