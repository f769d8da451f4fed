"""One run, written: metrics in batches from a thread, so that the training loop never waits."""

import json
import queue
import random
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from PIL import Image

from workbench.errors import Failure
from workbench.tracking.store import STATUS, experiment

HISTORY = "history.parquet"


class Tracker:
    """One MLflow run: metrics through a writer thread, artifacts at once.

    Args:
        name: shown in the UI.
        tags, params: logged at the start; a parent is given by `parent`.
        datasets: name -> (digest, counts) of what the run learns from and is judged on.
        flush: largest number of metric values kept back; `seconds` the longest time.
    Raises (on the next call): whatever the writer thread met.
    """

    def __init__(
        self,
        client: MlflowClient,
        name: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        datasets: Mapping[str, tuple[str, Mapping[str, int]]] | None = None,
        parent: str | None = None,
        flush: int = 900,
        seconds: float = 5.0,
    ):
        all_tags = dict(tags) | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
        run = client.create_run(experiment(client).experiment_id, run_name=name, tags=all_tags)
        self.client, self.run_id, self.name = client, run.info.run_id, name
        client.log_batch(self.run_id, params=[Param(k, str(v)) for k, v in params.items()])
        inputs = [
            DatasetInput(
                Dataset(
                    name, digest[:36], source_type="local", source=json.dumps({"uri": name}), profile=json.dumps(counts)
                ),
                [InputTag("mlflow.data.context", name)],
            )
            for name, (digest, counts) in (datasets or {}).items()
        ]
        if inputs:
            _log_inputs(client, self.run_id, inputs)
        self._rows: dict[int, dict[str, float]] = {}
        self._queue: queue.SimpleQueue[list[Metric] | None] = queue.SimpleQueue()
        self._flush, self._seconds = flush, seconds
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; returns at once. Several calls for one step are merged in the history."""
        self._raise()
        now = int(time.time() * 1000)
        self._rows.setdefault(step, {}).update(metrics)
        self._queue.put([Metric(k, v, now, step) for k, v in metrics.items()])

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """A picture with a step slider in the UI."""
        self._raise()
        self.client.log_image(self.run_id, Image.fromarray(pixels), key=key, step=step)

    def picture(self, file: str, pixels: np.ndarray) -> None:
        """A picture under a file's name, to the pixel."""
        self._raise()
        self.client.log_image(self.run_id, Image.fromarray(pixels), file)

    def table(self, file: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """A table, rendered by the UI."""
        self.client.log_table(self.run_id, {k: list(v) for k, v in columns.items()}, file)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file or a folder."""
        (self.client.log_artifacts if path.is_dir() else self.client.log_artifact)(self.run_id, str(path), folder)

    def tag(self, key: str, value: str) -> None:
        """A tag of the run."""
        self.client.set_tag(self.run_id, key, value)

    def close(self, state: str, reason: str = "") -> None:
        """Deliver what is left, attach the history and end the run.

        Args:
            state: "complete", "pruned", "interrupted" or "failed"; tagged, since MLflow shows fewer.
        """
        self._queue.put(None)
        self._thread.join()
        self.tag("workbench.state", state)
        if reason:
            self.tag("workbench.reason", reason[:5000])
        if self._rows:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / HISTORY
                history(self._rows).write_parquet(path)
                self.artifact(path)
        self.client.set_terminated(self.run_id, STATUS.get(state, "KILLED"))
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise Failure(f"tracking of run {self.name} failed: {self._error}") from self._error

    def _write(self) -> None:
        waiting: list[Metric] = []
        due = time.monotonic() + self._seconds
        try:
            while True:
                try:
                    item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
                except queue.Empty:
                    item = []
                waiting += item or []
                if item is None or len(waiting) >= self._flush or time.monotonic() >= due:
                    for start in range(0, len(waiting), 1000):  # MLflow's limit for one batch
                        self.client.log_batch(self.run_id, metrics=waiting[start : start + 1000])
                    waiting, due = [], time.monotonic() + self._seconds
                if item is None:
                    return
        except Exception as error:  # kept for the next call from the training thread
            self._error = error


def _log_inputs(client: MlflowClient, run_id: str, inputs: list[DatasetInput], tries: int = 5) -> None:
    """Name a run's data sets, again where another run named one for the first time at the same moment.

    MLflow looks a data set up and then inserts it; whoever comes second meets its own uniqueness constraint, and the
    next time finds it.
    """
    for left in reversed(range(tries)):
        try:
            client.log_inputs(run_id, inputs)
            return
        except MlflowException:
            if not left:
                raise
            time.sleep(0.1 * random.random())


def history(rows: Mapping[int, Mapping[str, float]]) -> pl.DataFrame:
    """A run's metrics as one wide frame: `step`, then a column a metric, sorted."""
    names = sorted({name for row in rows.values() for name in row})
    columns = {name: [rows[step].get(name) for step in sorted(rows)] for name in names}
    return pl.DataFrame({"step": sorted(rows)} | columns, schema={"step": pl.Int64} | {n: pl.Float64 for n in names})
