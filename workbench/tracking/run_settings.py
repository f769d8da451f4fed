"""All settings of a run, of which the UI shows as parameters only those that tell it from others.

Sixty parameters, most of them defaults, hide what the UI shows below them, and the few in which runs differ. So a run
has as parameters only what its caller chooses. All of its settings are in a tag that the UI does not list, from which
they are read back with the run itself, and for people in the artifact `settings.json`.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mlflow.entities import Run

from workbench.common.secrets import hide_passwords
from workbench.tracking import tags

FILE = "settings.json"
LONGEST = 4900  #: characters of a tag's value that every tracking store takes


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a tracking store has them: texts without passwords."""
    return {name: hide_passwords(str(value)) for name, value in settings.items()}


def settings_tag(settings: Mapping[str, str]) -> dict[str, str]:
    """The tag with all settings of a run; none where it would be longer than a store takes."""
    text = json.dumps(dict(settings), separators=(",", ":"))
    return {tags.SETTINGS: text} if len(text) <= LONGEST else {}


def settings_of(run: Run) -> dict[str, str]:
    """Every setting of a run by its dotted name, as text; of a run of an earlier version, its parameters."""
    stored: dict[str, str] = {}
    with suppress(ValueError):  # no such tag, or one that somebody has edited
        found = json.loads(run.data.tags.get(tags.SETTINGS, ""))
        stored = {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
    return {**stored, **run.data.params}
