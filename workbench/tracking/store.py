"""The tracking store: the connection to it, and the workbench's experiment in it."""

import logging
import os
import re
import shlex
from contextlib import nullcontext, suppress
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from workbench.common.command_line import this_python
from workbench.common.errors import Failure, UserError
from workbench.common.files import create_as_umask_says
from workbench.common.locks import exclusive
from workbench.common.paths import database_url
from workbench.common.secrets import hide_passwords
from workbench.tracking import tags

EXPERIMENT = "diffusion-dpo"
Client = MlflowClient  #: the name for packages that may not import MLflow
#: MLflow's status by a run's state; for other states KILLED, which the UI shows as a failure. A pruned trial is none.
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}

logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback at each retry
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line at each retry

#: Requests fail soon, since callers that can wait retry by themselves. Links that MLflow prints are off because they
#: show the server's password.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "PGCONNECT_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


#: Variables that send requests through a proxy. Programs read them in upper or in lower case.
PROXIES = [name for kind in ("HTTP", "HTTPS", "ALL") for name in (f"{kind}_PROXY", f"{kind.lower()}_proxy")]


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""
    return database_url("MLFLOW_TRACKING_URI", "mlflow.db")


def missing() -> str | None:
    """The line for the person where the tracking store is a file that is not there; None else.

    To be asked by commands that only look: `connect` would make it.
    """
    file = database_path()
    if file is None or file.exists():
        return None
    return f"no study yet: there is no {file} (MLFLOW_TRACKING_URI says where runs lie); run python -m workbench.sweep"


def connect_to_read() -> MlflowClient:
    """A client of the tracking store for those who only look: it is not made where it is missing.

    Raises:
        UserError: it is a file that is not there.
        Failure: as `connect`.
    """
    if none := missing():
        raise UserError(none)
    return connect()


def import_stores() -> None:
    """Import what `connect` needs for a database and otherwise imports itself; for those who have to wait meanwhile."""
    if not tracking_uri().startswith("http"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def connect() -> MlflowClient:
    """A client of the tracking store; the store's tables are created if they are missing.

    Raises:
        Failure: the store cannot be reached.
    """
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    uri, ready = tracking_uri(), True
    if uri.startswith("http"):  # one plain request: the client would retry for minutes
        _require_server(uri)
    else:
        ready = _require_database(uri)
    try:
        # `mlflow.artifacts` takes no client: it asks the store of this global address.
        mlflow.set_tracking_uri(uri)
        # Two processes that create the tables at once both fail, so one at a time does it.
        with nullcontext() if ready else exclusive(uri, "schema"):
            client = MlflowClient(uri)
            # A client alone asks nothing: only a request shows whether the store answers.
            client.search_experiments(max_results=1)
        return client
    except Exception as error:  # whatever the store's driver raises
        raise Failure(f"tracking store {hide_passwords(uri)} cannot be opened ({in_short(error)})") from None


def _require_server(uri: str) -> None:
    """Check that a tracking server answers; one on this machine is called without a proxy.

    Raises:
        Failure: it does not.
    """
    import requests

    host = urlsplit(uri).hostname or ""
    if host in ("localhost", "127.0.0.1", "::1"):
        # A proxy would look for `localhost` on its own machine.
        exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (exempt, host)))
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        proxies = [name for name in PROXIES if os.environ.get(name)] if requests.utils.get_environ_proxies(uri) else []
        hint = f" ({', '.join(proxies)} is set; if it is not behind that, add {host} to NO_PROXY)" if proxies else ""
        raise Failure(
            f"tracking server {hide_passwords(uri)} cannot be reached ({type(error).__name__}); start it{hint}, "
            "or unset MLFLOW_TRACKING_URI to use sqlite here"
        ) from None


def in_short(error: BaseException) -> str:
    """What an exception says, on one line and without passwords."""
    lines = (line.strip() for line in str(error).splitlines())
    # SQLAlchemy begins with a line about when it asked the database, where the next one has what that said.
    told = (line for line in lines if line and not line.startswith("(raised as a result of"))
    line = next(told, type(error).__name__)
    # A client that has retried puts the cause behind an account of every attempt.
    cause = re.search(r"\[Errno -?\d+\] [\w ]+|too many \d+ error responses", line)
    if cause and "Max retries exceeded" in line:
        line = f"{line.partition(' failed with')[0]}: {cause[0]}"
    return hide_passwords(line)[:300]


def restore_command(kind: str, number: str) -> str:
    """The shell command that brings something back from MLflow's trash.

    Args:
        kind: "runs" or "experiments"; `number` is the id of one.
    """
    option = {"runs": "--run-id", "experiments": "--experiment-id"}[kind]
    uri = shlex.quote(hide_passwords(tracking_uri()))
    return f"MLFLOW_TRACKING_URI={uri} {this_python()} -m mlflow {kind} restore {option} {number}"


def experiment(client: MlflowClient) -> Experiment:
    """The workbench's experiment, created if it is missing.

    Raises:
        Failure: it is in the trash, where no run can be added to it.
    """
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # An absolute path keeps artifacts together whatever folder a later command runs in. MLflow would make a
        # relative one absolute; its own default depends on the working folder too.
        place = None if tracking_uri().startswith("http") else Path("mlruns").resolve().as_uri()
        note = (
            "Preference optimisation of diffusion models. A study is a parent run, a trial its child. Sections: "
            "`rewards/` implicit rewards against the moving reference, `divergence/` paper's Eq. 8, `kl/` kernel KL, "
            "`reference/` what the reference did, `eval/` samples against the pretrained model's, `timestep_*/` by "
            "timestep bucket against the pretrained model."
        )
        about = {tags.NOTE: note} | ({tags.STORE: str(path)} if (path := database_path()) else {})
        with suppress(MlflowException):  # another process may have created it since
            client.create_experiment(EXPERIMENT, artifact_location=place, tags=about)
        found = client.get_experiment_by_name(EXPERIMENT)
        assert found is not None
    if found.lifecycle_stage != "active":
        raise Failure(
            f"experiment {EXPERIMENT!r} of the tracking store was deleted; restore it: "
            f"{restore_command('experiments', found.experiment_id)}"
        )
    return found


def database_path() -> Path | None:
    """The file of the tracking store, where it is an sqlite database that this process opens itself."""
    uri = tracking_uri()
    if not uri.startswith("sqlite:///"):
        return None
    from sqlalchemy import make_url

    return Path(make_url(uri).database or "").resolve()


def _require_version(uri: str, version: str) -> None:
    """Refuse tables of another MLflow, which this one would change, or fail over, without a question.

    Raises:
        Failure: they are older or newer; names the remedy.
    """
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    script = ScriptDirectory.from_config(_get_alembic_config(""))
    if version in script.get_heads():
        return
    store = f"tracking store {hide_passwords(uri)}"
    if version not in {revision.revision for revision in script.walk_revisions()}:
        raise Failure(
            f"{store}: its tables are of a newer MLflow than {mlflow.__version__}, which is installed here; install "
            "that, or name another store with MLFLOW_TRACKING_URI"
        )
    path = database_path()
    backup = f"cp {shlex.quote(str(path))} {shlex.quote(f'{path}.backup')}" if path else "a backup"
    upgrade = f"{this_python()} -m mlflow db upgrade {shlex.quote(hide_passwords(uri))}"
    raise Failure(
        f"{store}: its tables are of an older MLflow than {mlflow.__version__}; they have to be changed, for good: "
        f"first {backup}, then {upgrade}"
    )


def _require_database(uri: str) -> bool:
    """Whether MLflow's tables are in the database. Connects once, where MLflow would retry for minutes.

    Raises:
        Failure: the database cannot be reached.
    """
    import sqlalchemy

    file = database_path()
    if file and file.name != ":memory:":
        with suppress(OSError):  # said by whoever opens it
            create_as_umask_says(file)
    try:
        with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect() as connection:
            try:  # a row that MLflow adds after everything else
                ready = connection.execute(sqlalchemy.text("SELECT 1 FROM experiments")).first() is not None
                version = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
            except sqlalchemy.exc.SQLAlchemyError:
                return False
        _require_version(uri, str(version))
        return ready
    except Failure:
        raise
    except Exception as error:  # whatever its driver raises
        raise Failure(
            f"tracking store {hide_passwords(uri)} cannot be opened ({in_short(error)}); MLFLOW_TRACKING_URI takes "
            "sqlite:///PATH, postgresql://... or http://..."
        ) from None
