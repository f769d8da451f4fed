"""Where the tracking store puts artifacts: checked before anything is trained, and changed after a folder has moved.

MLflow stores artifact locations as absolute addresses, in the experiment and in every run. A project folder that was
moved or copied therefore still writes into the old folder, or fails at the end of a run.
"""

import shlex
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.entities import Experiment
from sqlalchemy import MetaData, Table, create_engine, select, update

from workbench.common.command_line import this_python
from workbench.common.errors import Failure, UserError
from workbench.common.files import require_writable
from workbench.common.secrets import hide_passwords
from workbench.tracking import tags
from workbench.tracking.delivery import require_reachable
from workbench.tracking.store import connect, database_path, experiment, missing, tracking_uri

#: Tables of MLflow with artifact locations, and the column in each.
LOCATIONS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}

#: Tags of runs that name a place on a machine, as HOST:PATH.
PLACES = (tags.STORAGE, tags.STATE_FOLDER)


def local_path(uri: str) -> Path | None:
    """The path that an artifact location means on this machine; None if it is served, or in an object store."""
    address = urlparse(uri)
    if address.scheme not in ("", "file"):
        return None
    return Path(unquote(address.path))


@require_reachable()
def check_artifacts(client: MlflowClient) -> None:
    """Make sure that new runs and their artifacts can be written, and that these belong to this tracking store.

    Raises:
        Failure: the store has gone away since it was connected to, or cannot be written; or the place of artifacts
            cannot, or is another project folder's. The message names the remedy.
    """
    if database := database_path():
        require_writable(database, "tracking store", "let this user write it, or name another with MLFLOW_TRACKING_URI")
    found = experiment(client)
    folder = local_path(found.artifact_location)
    if folder is None:  # a server or an object store, which is asked when the first artifact is sent
        return
    # A server that hands out a plain path lets its clients write there themselves.
    if tracking_uri().startswith("http"):
        _require_shared(folder)
    else:
        _require_in_place(client, found, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder)
    except OSError as error:
        raise Failure(
            f"artifacts of this tracking store go to {folder}, which cannot be written ({error.strerror}); make it "
            f"writable, or let them go elsewhere: {_relocate(folder, Path('mlruns').resolve())}"
        ) from None


def require_trackable() -> None:
    """Make sure, before hours of work, that a run can be tracked after them.

    A store that is not there is not made yet: the settings of the command that asks may still be wrong.

    Raises:
        Failure: the store cannot be reached, made or written; or as `check_artifacts`.
    """
    if not missing():
        check_artifacts(connect())
        return
    database, artifacts = database_path(), Path("mlruns").resolve()
    assert database is not None  # what is missing is a file
    for folder in (database.parent, artifacts if artifacts.exists() else artifacts.parent):
        try:
            _try_writing(folder)
        except OSError as error:
            raise Failure(
                f"tracking store {database}: cannot be made, since {folder} cannot be written ({error.strerror}); work "
                "in another folder, or name another with MLFLOW_TRACKING_URI"
            ) from None


def _try_writing(folder: Path) -> None:
    # Writing is the only sure test: permission bits say nothing about a read-only mount or a full disk.
    with NamedTemporaryFile(dir=folder, prefix=".probe-"):
        pass


def _require_shared(folder: Path) -> None:
    """Refuse a server that lets clients write artifacts themselves, to a path that this machine does not have."""
    host = urlparse(tracking_uri()).hostname
    # A server here has the same paths; a folder that both machines have mounted is right too.
    if host in ("localhost", "127.0.0.1", "::1") or folder.is_dir():
        return
    raise Failure(
        f"tracking server {hide_passwords(tracking_uri())} keeps artifacts at {folder}, a path of its own machine, and "
        "does not pass them on; start it with --artifacts-destination PATH, and change what its database has so far: "
        f"{_relocate(folder, 'mlflow-artifacts:/')}, with MLFLOW_TRACKING_URI set to the database"
    )


def _require_in_place(client: MlflowClient, found: Experiment, folder: Path) -> None:
    """Refuse an artifact folder that was chosen for a database elsewhere, of which this one is a copy or was moved."""
    database, chosen_for = database_path(), found.tags.get(tags.STORE)
    if database is None:
        return
    if chosen_for is None:  # made by an earlier version
        # A missing project folder was moved; a missing `mlruns` in an existing one has only not been needed yet.
        if not folder.exists() and not folder.parent.exists():
            raise _moved(folder.parent, database.parent)
    # An artifact folder outside of the old project has not moved with the database, so it is still the right one.
    elif folder.is_relative_to(Path(chosen_for).parent) and not _same_file(Path(chosen_for), database):
        raise _moved(Path(chosen_for).parent, database.parent)
    # The place is right, but the database is not noted yet, or by another path. Only a noted one shows a later move.
    if chosen_for != str(database):
        client.set_experiment_tag(found.experiment_id, tags.STORE, str(database))


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, as they do where a folder is mounted twice."""
    return one == other or (one.exists() and one.samefile(other))


def _moved(old: Path, new: Path) -> Failure:
    return Failure(
        f"this tracking store was moved or copied from {old} to {new}, and its artifacts would still go to {old}; "
        f"first: {_relocate(old, new)}"
    )


def _relocate(old: Path | str, new: Path | str) -> str:
    return f"{this_python()} -m workbench.study relocate {shlex.quote(str(old))} {shlex.quote(str(new))}"


def relocate(old: str, new: str) -> dict[str, int]:
    """Change every artifact location below one folder, or address, to lie below another. The files are not moved.

    Args:
        old, new: absolute paths, or the beginnings of addresses such as s3://BUCKET/x.
    Returns:
        How many locations were changed, by table.
    Raises:
        UserError: the tracking store is behind a server, which does not let locations be changed.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        raise UserError(
            "relocate: a tracking server does not change artifact locations; set MLFLOW_TRACKING_URI to its database"
        )
    # MLflow's client cannot change a location, so its tables are changed directly.
    engine, changed = create_engine(uri), {}
    with engine.begin() as connection:  # all or nothing
        metadata = MetaData()
        for name, column in LOCATIONS.items():
            table = Table(name, metadata, autoload_with=engine)
            key, location = next(iter(table.primary_key.columns)), table.c[column]
            rows = [(row[0], moved) for row in connection.execute(select(key, location))
                    if (moved := _moved_location(row[1], old, new)) is not None]  # fmt: skip
            for number, moved in rows:
                connection.execute(update(table).where(key == number).values({location: moved}))
            changed[name] = len(rows)
        table = Table("tags", metadata, autoload_with=engine)
        places = select(table.c.run_uuid, table.c.key, table.c.value).where(table.c.key.in_(PLACES))
        for run, key, place in connection.execute(places).all():
            host, _, path = place.partition(":")
            if (moved := _moved_location(path, old, new)) is not None:
                row = update(table).where(table.c.run_uuid == run, table.c.key == key)
                connection.execute(row.values(value=f"{host}:{moved}"))
        # Without this `check_artifacts` would still take the store for one that was moved, and refuse it.
        database = database_path()
        if database is not None:
            table = Table("experiment_tags", metadata, autoload_with=engine)
            recorded = update(table).where(table.c.key == tags.STORE).values(value=str(database))
            connection.execute(recorded)
    engine.dispose()
    return changed


def _moved_location(location: str | None, old: str, new: str) -> str | None:
    """A location below `old` as it is below `new`; None if it lies elsewhere."""
    for before, after in _spellings(old.rstrip("/"), new.rstrip("/")):
        if location == before:
            # `mlflow-artifacts:/` has lost its slash to `rstrip`, and is no address without it.
            return f"{after}/" if after.endswith(":") else after
        if location is not None and location.startswith(f"{before}/"):
            return after + location[len(before) :]
    return None


def _spellings(old: str, new: str) -> list[tuple[str, str]]:
    """Both addresses as MLflow may have written them: paths plain and as file: URIs."""
    new_uri = Path(new).as_uri() if new.startswith("/") else new
    if old.startswith("/"):
        return [(Path(old).as_uri(), new_uri), (old, new)]
    return [(old, new_uri)]
