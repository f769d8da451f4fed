"""Names, numbers and folders that a user gives, checked."""

import math
import os
import re
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any

import click
from pydantic import Field

from workbench.common.errors import UserError, shown

LARGEST = 2**32 - 1  # beyond what anybody counts to here, and the largest seed that numpy takes
EDGE = 8192  # of images, pixels
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
#: The name of a run, and so of an arm.
RUN_NAME = re.compile(r"[^\W_][\w .,:=+-]{0,199}")


def study_name(text: str) -> str:
    """A study's name, checked.

    Raises:
        UserError: it could not be a folder's name.
    """
    return checked_name("--study", text)


def study_address(text: str) -> str:
    """A study's name, or NAME@TOKEN where several have that name, checked.

    Raises:
        UserError: it could not be a folder's name.
    """
    name, at, token = text.partition("@")
    study_name(name)
    if at and not re.fullmatch(r"[0-9a-f]{1,32}", token):
        raise UserError(f"--study {shown(text)}: after the '@' comes a study's token, digits and letters from a to f")
    return text


def checked_name(option: str, text: str) -> str:
    """A name that becomes a folder's, checked.

    Raises:
        UserError: it could not be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise UserError(
            f"{option} {shown(text)}: use up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return text


def run_name(option: str, text: str) -> str:
    """A name for a run, checked.

    Raises:
        UserError: a tracking store or a table would not show it as it is.
    """

    if not RUN_NAME.fullmatch(text):
        raise UserError(
            f"{option} {shown(text)}: use up to 200 letters, digits, blanks and . , : = + - _, starting with a "
            "letter or digit"
        )
    return text


def writable_folder(option: str, folder: Path) -> Path:
    """A folder that files can be written to, made where it is missing; better found out now than after the work.

    Raises:
        UserError: there cannot be one.
    """

    if not is_place(str(folder)):
        raise UserError(f"{option} {shown(str(folder))}: no folder has such a name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".probe-"):
            pass
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror})") from None
    return folder


def whole_number(variable: str, default: int, least: int) -> int:
    """The whole number that an environment variable has.

    Raises:
        UserError: it has something else, or a smaller one.
    """
    text = os.environ.get(variable) or str(default)
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text) or int(text) < least:
        raise UserError(f"{variable} = {shown(text)}: expected a whole number, at least {least}")
    return int(text)


class Finite(click.FloatRange):
    """A number in a range, which may have no end but is never beyond all numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert and check the range as click does, then refuse infinity and NaN."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


def is_place(text: str) -> bool:
    """Whether a text could name a file or folder, or something on the hub."""
    # The limits of Linux: 255 bytes a name, 4096 a path.
    return text.isprintable() and len(text) < 4096 and all(len(part.encode()) < 256 for part in text.split("/"))
