"""The parent run of each study, and the runs that are its children."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag

from workbench.common.errors import UserError
from workbench.tracking import tags
from workbench.tracking.store import STATUS, connect, experiment


def find_study(client: MlflowClient, study: str) -> Run | None:
    """The parent run of a study, or None."""
    runs = client.search_runs(
        [experiment(client).experiment_id],
        f"tags.`{tags.STUDY}` = '{literal(study)}' AND tags.`{tags.KIND}` = 'study'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return runs[0] if runs else None


def literal(text: str) -> str:
    """A text as it may stand between quotes in MLflow's search language, which cannot escape a quote."""
    return text.replace("'", "")


def require_study(client: MlflowClient, study: str) -> Run:
    """The parent run of a study.

    Raises:
        UserError: there is none of that name; the message names those there are.
    """
    run = find_study(client, study)
    if run is None:
        raise UserError(f"study {study!r}: not found; there are: {', '.join(study_names(client)) or 'none yet'}")
    return run


def study_names(client: MlflowClient) -> list[str]:
    """Names of all studies, the one last worked on first."""
    runs = list(client.search_runs([experiment(client).experiment_id], f"tags.`{tags.KIND}` = 'study'"))
    runs.sort(key=lambda run: float(run.data.tags.get(tags.TOUCHED, 0)), reverse=True)
    return [run.data.tags[tags.STUDY] for run in runs]


def children(client: MlflowClient, parent: Run) -> list[Run]:
    """All runs of a study, in the order in which they began."""
    query, order = f"tags.`{tags.PARENT}` = '{parent.info.run_id}'", ["attributes.start_time ASC"]
    runs: list[Run] = []
    page_token = None
    with _garbage_collection_off():
        while True:
            page = client.search_runs([parent.info.experiment_id], query, order_by=order, page_token=page_token)
            runs += page
            page_token = page.token
            if not page_token:
                return runs


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """For code that makes many objects at once: each collection would walk through all that a notebook holds."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def is_complete(client: MlflowClient, study: str) -> bool:
    """Whether a study's parent run says that the study is complete."""
    run = find_study(client, study)
    return run is not None and run.info.status == "FINISHED" and run.data.tags.get(tags.STATE) == "complete"


def open_study(client: MlflowClient, study: str, note: str) -> str:
    """The id of a study's parent run, set to RUNNING; the run is created if it is missing."""
    run = find_study(client, study)
    if run is None:
        about = {tags.STUDY: study, tags.KIND: "study", tags.NOTE: note}
        run = client.create_run(experiment(client).experiment_id, run_name=study, tags=about)
    client.update_run(run.info.run_id, status="RUNNING")
    client.set_tag(run.info.run_id, tags.TOUCHED, f"{time.time():.0f}")
    return run.info.run_id


def finish_study(client: MlflowClient, run_id: str, metrics: Mapping[str, float], note: str, state: str) -> None:
    """Write a study's summary onto its parent run and end that run.

    Args:
        state: "complete", "interrupted" or "failed"; "running" writes the summary and leaves the run open.
    """
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
        tags=[RunTag(tags.NOTE, note), RunTag(tags.STATE, state)],
    )
    # The state comes first: a kill between the two leaves a run that is RUNNING and is reconciled, where the other
    # order would leave a FINISHED run that does not say how it ended.
    if state != "running":
        client.set_terminated(run_id, STATUS.get(state, "KILLED"))


def describe_study(client: MlflowClient, study: str, title: str, text: str, metrics: Mapping[str, float]) -> None:
    """Add a section to the description of a study's parent run, or replace the section of that title, and log metrics.

    A run that has all of it already is left as it is. `finish_study` writes the description anew.

    Args:
        title: of the last section; what follows it in an earlier description is dropped.
        text: in Markdown.
    """
    run = require_study(client, study)
    mark = f"\n\n### {title}\n\n"
    before = run.data.tags.get(tags.NOTE, "")
    note = before.partition(mark)[0] + mark + text
    if note == before and metrics.items() <= run.data.metrics.items():
        return
    now = int(time.time() * 1000)
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
        tags=[RunTag(tags.NOTE, note)],
    )


def attach(study: str, path: Path, folder: str = "figures") -> None:
    """Attach a file, or all files of a folder, to a study's parent run, under an artifact folder."""
    client = connect()
    log = client.log_artifacts if path.is_dir() else client.log_artifact
    log(require_study(client, study).info.run_id, str(path), folder)
