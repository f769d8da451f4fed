"""Delivery of outboxes to the tracking store, for live runs and for runs whose process is gone."""

import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_LOGGED_IMAGES

from workbench.common.errors import Failure
from workbench.tracking.outbox import LIMIT, Outbox, Record, outboxes
from workbench.tracking.store import STATUS, connect, in_short
from workbench.tracking.tags import STATE

log = logging.getLogger(__name__)


def deliver(client: MlflowClient) -> list[str]:
    """Deliver the outboxes of runs whose processes are gone. A run ends only if its outbox says how it ended.

    Returns:
        Ids of runs that could not be delivered completely; a warning says why.
    """
    left = []
    for outbox in outboxes():
        if not outbox.acquire():  # the run is alive and delivers by itself
            continue
        try:
            deliver_outbox(client, outbox)
            if outbox.refused:
                log.warning(
                    "run %s: the store refused something (%s), kept in %s", outbox.run_id, outbox.refused, outbox.folder
                )
        except Exception as error:
            # An error of any kind: the outboxes of other runs are delivered all the same.
            left.append(outbox.run_id)
            log.warning("run %s: still waits in %s (%s)", outbox.run_id, outbox.folder, in_short(error))
        finally:
            outbox.close()
    return left


def undelivered() -> list[str]:
    """Ids of runs whose processes are gone and whose outboxes are not empty."""
    run_ids = []
    for outbox in outboxes():
        if outbox.acquire():
            if outbox.waiting:
                run_ids.append(outbox.run_id)
            outbox.close()
    return run_ids


def deliver_outbox(client: MlflowClient, outbox: Outbox) -> None:
    """Deliver an outbox's waiting records, in order.

    A record that is delivered again after a crash changes nothing: MLflow ignores a metric that it has with the same
    step, value and millisecond, and records of other kinds overwrite what they wrote before.

    Raises:
        Exception: what the store's client raises while the store is away; records that it has not accepted still wait.
    """

    def send(records: list[Record]) -> None:
        try:
            _SENDERS[records[0]["kind"]](client, outbox, records)
        except Exception as error:
            if is_away(error):
                raise
            if len(records) > 1:  # one bad record must not keep the rest of its batch out
                for record in records:
                    send([record])
            else:
                records[0]["refused"] = in_short(error)

    # Where `send` raises, the next batch is never requested, so the outbox does not count this one as accepted.
    for batch in outbox.batches():
        send(batch)


def is_away(error: BaseException) -> bool:
    """Whether a retry may help: the store is unreachable, broken or denies access, but has not rejected the content.

    A store that does not know the run counts as away, since the run may belong to another store.
    """
    if isinstance(error, MlflowException):
        if error.error_code == "BAD_REQUEST" and "sqlalche.me" in str(error):  # MLflow's code for any database error
            return not re.search(r"DataError|IntegrityError|ProgrammingError", str(error))
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        # The two exceptions are about one file, and a retry meets them again; other errors of the system are the
        # network's, or a full disk's.
        return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)
    # 401 and 403: a login that is wrong or has expired. 404: a run of another store. 408, 425, 429: too slow, too
    # early, too many requests.
    return status >= 500 or status in (401, 403, 404, 408, 425, 429)


def _metrics(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    metrics = [Metric(k, v, record["time"], record["step"]) for record in records for k, v in record["values"].items()]
    # The outbox never splits a record, so a step with more values than one request may have is split here.
    for start in range(0, len(metrics), LIMIT):
        client.log_batch(outbox.run_id, metrics=metrics[start : start + LIMIT])


def _params(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    params = [Param(key, value) for key, value in records[0]["values"].items()]
    for start in range(0, len(params), 100):  # MLflow's limit for these
        client.log_batch(outbox.run_id, params=params[start : start + 100])


def _tags(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    client.log_batch(outbox.run_id, tags=[RunTag(key, value) for key, value in records[0]["values"].items()])


def _inputs(client: MlflowClient, outbox: Outbox, records: list[Record], tries: int = 5) -> None:
    """Log a run's data sets; retried, since another run may be the first to log the same data set at this moment.

    MLflow looks a data set up and then inserts it. Of two runs that do so at once, one violates MLflow's uniqueness
    constraint; when it tries again, it finds the other's row.
    """
    # 36 characters are the longest digest that MLflow accepts.
    inputs = [
        DatasetInput(
            Dataset(
                name, digest[:36], source_type="local", source=json.dumps({"uri": name}), profile=json.dumps(counts)
            ),
            [InputTag("mlflow.data.context", name)],
        )
        for name, (digest, counts) in records[0]["values"].items()
    ]
    for left in reversed(range(tries)):
        try:
            client.log_inputs(outbox.run_id, inputs)
            return
        except MlflowException:
            if not left:
                raise
            # A pause of random length, so that the same two runs do not collide again.
            time.sleep(0.1 * random.random())


def _artifact(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    path = outbox.path(records[0])
    (client.log_artifacts if path.is_dir() else client.log_artifact)(outbox.run_id, str(path), records[0]["folder"])


def _remove(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    """Remove a folder of artifacts; one that is not there, since a first try removed it, is no error."""
    folder = records[0]["folder"]
    # MLflow's client has no call that deletes artifacts, the repository behind it has.
    if client.list_artifacts(outbox.run_id, folder):
        get_artifact_repository(client.get_run(outbox.run_id).info.artifact_uri).delete_artifacts(folder)


def _image(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    _artifact(client, outbox, records)
    # MLflow's own `log_image` marks a run that has images by this tag.
    client.set_tag(outbox.run_id, MLFLOW_LOGGED_IMAGES, True)


def _table(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    """Upload a table as MLflow's `log_table` would, which itself would append to rows that a first try has written."""
    _artifact(client, outbox, records)
    tables = json.loads(client.get_run(outbox.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    table = {"path": outbox.path(records[0]).name, "type": "table"}
    # A second delivery must not list the table twice.
    if table not in tables:
        client.set_tag(outbox.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, table]))


def _end(client: MlflowClient, outbox: Outbox, records: list[Record]) -> None:
    end_run(client, outbox.run_id, records[0]["values"], records[0]["time"])


def end_run(client: MlflowClient, run_id: str, tags: Mapping[str, str], end_time: int | None = None) -> None:
    """Set the tags of a run's end, then the status that follows from its state."""
    # In this order: a run that is killed in between is still RUNNING, so that it is looked at again and ended.
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.set_terminated(run_id, STATUS.get(tags[STATE], "KILLED"), end_time)


_SENDERS: dict[str, Callable[[MlflowClient, Outbox, list[Record]], None]] = {
    "metrics": _metrics,
    "params": _params,
    "tags": _tags,
    "inputs": _inputs,
    "artifact": _artifact,
    "remove": _remove,
    "image": _image,
    "table": _table,
    "end": _end,
}


@contextmanager
def require_reachable() -> Iterator[None]:
    """Around requests that cannot wait in an outbox: a store that is away becomes one line for the user.

    Raises:
        Failure: the tracking store has gone away since it was connected to.
    """
    try:
        yield
    except Exception as error:
        if is_away(error):
            raise Failure(f"the tracking store is away ({in_short(error)})") from None
        raise


def wait_until_reachable(
    stopping: Callable[[], bool] = lambda: False, seconds: float = float("inf")
) -> MlflowClient | None:
    """Connect to the tracking store, and wait for it while it is away. A warning is logged once.

    Returns:
        None if `stopping` returned True, or after `seconds`.
    """
    pause, warned, begin = 1.0, False, time.monotonic()
    while True:
        try:
            client = connect()
            if warned:
                log.warning("the tracking store is back")
            return client
        except Failure as error:
            if not warned:
                log.warning("%s; waiting until it is back", error)
            warned = True
        again = time.monotonic() + pause
        # In short naps, so that a stop is noticed at once and not after a pause of up to 30 seconds.
        while time.monotonic() < again:
            if stopping() or time.monotonic() - begin > seconds:
                return None
            time.sleep(0.1)
        pause = min(2 * pause, 30.0)
