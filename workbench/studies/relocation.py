"""What has to change after a project folder was moved or copied: absolute paths in stores, studies and snapshots."""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from workbench.common.errors import UserError
from workbench.common.paths import state_path
from workbench.studies.recovery import best_folders
from workbench.studies.storage import locked, missing, open_storage, own_studies
from workbench.tracking import artifacts, store
from workbench.training.snapshots import PATTERN, Finished, Snapshots

#: Tables of Optuna with JSON in which settings are stored, their key, and the attributes meant.
SETTINGS = {
    "study_user_attributes": ("study_user_attribute_id", ("definition", "settings")),
    "trial_user_attributes": ("trial_user_attribute_id", ("overrides",)),
}


def relocate(old: str, new: str, url: str) -> Iterator[str]:
    """Let everything that lay below one folder, or address, be looked for below another. Files are not moved.

    Args:
        url: of the study database.
    Returns:
        A line for each thing that was changed.
    Raises:
        UserError: there are neither studies, runs nor snapshots here, or the tracking store is behind a server.
    """
    # What is not there is not opened, which would make it.
    no_studies, no_runs = missing(url), store.missing()
    folders = _folders("runs")  # of single runs, which need no database
    if no_studies and no_runs and not folders:
        raise UserError(f"relocate: {no_studies}")
    if not no_runs:
        # First, since it refuses a store behind a server before anything is changed.
        for table, count in artifacts.relocate(old, new).items():
            if count:
                yield f"{count} artifact locations of {table}"
    if not no_studies:
        folders += yield from _relocate_studies(old, new, url)
    changed = sum(_relocate_snapshot(folder, old, new) for folder in folders)
    if changed:
        yield f"{changed} snapshots"


def _relocate_studies(old: str, new: str, url: str) -> Generator[str, None, list[Path]]:
    """Change the settings of all studies; their folders of snapshots, which are still to change."""
    with locked(url):
        storage = open_storage(url)
        ours = own_studies(storage)
        with storage.engine.begin() as connection:
            changed = sum(_relocate_settings(connection, name, old, new) for name in ours)
        if changed:
            yield f"{changed} settings of studies"
        folders = [path for name, record in ours.items() for path in _folders("studies", f"{name}-{record.token}")]
        return folders + [path for name, record in ours.items() for path in best_folders(name, record.token)]


def _folders(*parts: str) -> list[Path]:
    return [path for path in state_path(*parts).glob("*") if path.is_dir()]


def _relocate_settings(connection: Connection, study: str, old: str, new: str) -> int:
    """Change the settings of a study and its trials, of those that have ended too: a retry takes its arm from them."""
    changed = 0
    for table, (key, names) in SETTINGS.items():
        of_study = "study_id = (SELECT study_id FROM studies WHERE study_name = :study)"
        if table.startswith("trial"):
            of_study = f"trial_id IN (SELECT trial_id FROM trials WHERE {of_study})"
        for name in names:
            query = text(f"SELECT {key}, value_json FROM {table} WHERE key = :name AND {of_study}")
            for number, stored in connection.execute(query, {"name": name, "study": study}).all():
                moved = json.dumps(moved_paths(json.loads(stored), old, new))
                if moved != json.dumps(json.loads(stored)):
                    update = text(f"UPDATE {table} SET value_json = :moved WHERE {key} = :number")
                    connection.execute(update, {"moved": moved, "number": number})
                    changed += 1
    return changed


def _relocate_snapshot(folder: Path, old: str, new: str) -> bool:
    """Write a run's newest snapshot anew with its settings' paths changed; whether there was something to change."""
    snapshots, before = Snapshots(folder), set(folder.glob(PATTERN))
    finished = snapshots.finished()
    if finished:
        snapshots.finish(Finished(**moved_paths(finished._asdict(), old, new)))
    newest = snapshots.newest()
    if newest is None or (settings := moved_paths(dict(newest.settings), old, new)) == newest.settings:
        return False
    snapshots.save(newest._replace(settings=settings))
    # After the new one is in place: a kill in between leaves both, and this is done again.
    for path in before:
        path.unlink(missing_ok=True)
    return True


def moved_paths(value: Any, old: str, new: str) -> Any:
    """A value of JSON in which every text that is a path below `old` is the same path below `new`."""
    if isinstance(value, dict):
        return {key: moved_paths(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved_paths(inner, old, new) for inner in value)
    if isinstance(value, str) and (value == old or value.startswith(f"{old.rstrip('/')}/")):
        return new.rstrip("/") + value[len(old.rstrip("/")) :]
    return value
