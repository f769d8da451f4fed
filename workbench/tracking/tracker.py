"""The tracker of one run: the training loop appends to a journal on disk, a thread delivers it to the store."""

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import copy, copytree
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import polars as pl
from mlflow import MlflowClient
from PIL import Image

from workbench.common.command_line import this_command
from workbench.common.errors import Failure
from workbench.common.paths import state_place
from workbench.common.processes import this_process
from workbench.common.secrets import hide_passwords
from workbench.tracking.artifacts import check_artifacts
from workbench.tracking.delivery import deliver_outbox, end_run, is_away
from workbench.tracking.outbox import METRICS, Outbox
from workbench.tracking.run_settings import FILE, as_text, settings_tag
from workbench.tracking.store import experiment, in_short
from workbench.tracking.tags import COMMIT, PARENT, PROCESS, REASON, SETTINGS, SOURCE, SOURCE_TYPE, STATE, STATE_FOLDER

HISTORY = "history.parquet"
FILES = ("artifact", "image", "table")  #: kinds of records that may take long to upload

log = logging.getLogger(__name__)


class Tracker:
    """Tracks one MLflow run. The run is created in the store; all else goes to disk first and is sent by a thread.

    While the store is away, the run goes on and the thread retries, at growing intervals.

    Args:
        name: shown in the UI.
        tags, params: logged at the start.
        settings: all settings of the run, of which `params` are those that the UI shows; None = it has no others.
        parent: id of the parent run, if there is one.
        datasets: name -> (digest, counts) of the data that the run trains on and is evaluated with.
        flush: number of metric values that trigger a delivery.
        seconds: longest time for which values are held back.
    Raises:
        Failure: the store is away, or artifacts cannot be written. Later, from `log` and `finish`: the disk is full, or
            the store rejected something.
    """

    def __init__(
        self,
        client: MlflowClient,
        name: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        settings: Mapping[str, Any] | None = None,
        datasets: Mapping[str, tuple[str, Mapping[str, int]]] | None = None,
        parent: str | None = None,
        flush: int = 900,
        seconds: float = 5.0,
    ):
        all_tags = {key: hide_passwords(value) for key, value in tags.items()}
        all_tags |= {SOURCE: this_command(), SOURCE_TYPE: "LOCAL"}
        all_tags |= {COMMIT: tags["git.commit"]} if "git.commit" in tags else {}
        shown, whole = as_text(params), as_text(settings or {})
        all_tags |= settings_tag(whole) if whole else {}
        if whole and SETTINGS not in all_tags:  # too long for a tag: then they have to be read from the parameters
            shown = whole | shown
        # By these a run that a dead process left open is recognised and ended later (`reconcile`).
        all_tags |= {PROCESS: this_process(), STATE_FOLDER: state_place()} | ({PARENT: parent} if parent else {})
        try:
            check_artifacts(client)  # before anything is trained that could not be kept
            run = client.create_run(experiment(client).experiment_id, run_name=name, tags=all_tags)
        except Failure:
            raise
        except Exception as error:
            if is_away(error):
                raise Failure(f"run {name}: the tracking store is away ({in_short(error)})") from None
            raise
        self.client, self.run_id, self.name = client, run.info.run_id, name
        self._outbox = Outbox(self.run_id)
        self._outbox.open()
        self._outbox.add("params", values=shown)
        if whole:
            with self._outbox.file("artifact", FILE, folder=None) as path:
                path.write_text(json.dumps(whole, indent=2), encoding="utf-8")
        if datasets:
            self._outbox.add("inputs", values=dict(datasets))
        self._rows: dict[int, dict[str, float]] = {}
        self._flush, self._seconds, self._values = flush, seconds, 0
        self._away = ""
        self._attached = self._urgent = self._gave_up = self._ended = self._over = False
        self._wake, self._attempted = threading.Event(), threading.Condition()
        # The first delivery comes at once: parameters and data sets wait already.
        self._wake.set()
        # A daemon thread does not keep a process alive that is done; what it has not delivered is on disk.
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of a step; returns at once. Several calls for one step are merged in the history."""
        self._raise_if_refused()
        self._rows.setdefault(step, {}).update(metrics)
        self._outbox.add(METRICS, step=step, values=dict(metrics))
        self._values += len(metrics)
        # While the store is away, the thread alone decides when to retry.
        if self._values >= self._flush and not self._away:
            self._values = 0
            self._wake.set()

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Log an image with a step slider in the UI, which recognises the file names of MLflow's `log_image`."""
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{time.time_ns() // 1_000_000}+{uuid4()}"
        with self._outbox.file("image", "images", folder="images") as place:
            place.mkdir()
            image = Image.fromarray(pixels)
            image.save(place / f"{name}.png")
            # The size of MLflow's own previews.
            image.thumbnail((256, 256))
            image.save(place / f"{name}+compressed.webp")

    def picture(self, file: str, pixels: np.ndarray) -> None:
        """Log an image as a PNG file of this name, to the pixel."""
        with self._outbox.file("artifact", file, folder=None) as path:
            Image.fromarray(pixels).save(path)

    def table(self, file: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Log a table, which the UI renders."""
        with self._outbox.file("table", file, folder=None) as path:
            frame = pd.DataFrame({key: list(values) for key, values in columns.items()})
            frame.to_json(path, orient="split", index=False, date_format="iso")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a copy of a file or a folder as it is now."""
        with self._outbox.file("artifact", path.name, folder=folder) as place:
            (copytree if path.is_dir() else copy)(path, place)

    def remove(self, folder: str) -> None:
        """Remove a folder of artifacts, once those that were logged before are delivered."""
        self._outbox.add("remove", folder=folder)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._outbox.add("tags", values={key: hide_passwords(value)})

    def finish(self, patience: float = 60.0) -> bool:
        """Log the history and wait until everything is delivered. The run stays open, for `end`.

        Args:
            patience: seconds to wait for a store that is away.
        Returns:
            Whether everything was delivered.
        Raises:
            Failure: the disk is full, or the store rejected something.
        """
        self._log_history()
        done = self._wait_until_delivered(patience)
        self._raise_if_refused()
        return done

    def end(self, state: str, reason: str = "", patience: float = 60.0) -> bool:
        """End the run. What cannot be delivered stays on disk for `deliver`, with a warning. Raises nothing.

        Args:
            state: "complete", "pruned", "interrupted" or "failed"; a tag, since MLflow's status has fewer values.
            patience: seconds to wait for a store that is away; two seconds if `finish` has waited in vain already.
        Returns:
            Whether everything was delivered.
        """
        if not self._ended:
            self._ended = True
            tags = {STATE: state} | ({REASON: hide_passwords(reason)[:5000]} if reason else {})
            try:
                self._outbox.add("end", values=tags)
            except Failure:  # the disk is full, so nobody could deliver it later: it has to be now
                with suppress(Exception):
                    end_run(self.client, self.run_id, tags)
            self._wait_until_delivered(2.0 if self._gave_up else patience)
            # From here on the thread starts no delivery; it closes the outbox and ends.
            self._over = True
            self._wake.set()
            self._thread.join(5.0)  # no longer: it may be in the middle of a request that hangs
            if self._outbox.waiting:
                log.warning(
                    "run %s: the tracking store is away (%s), so not everything is there; the rest waits in %s, and "
                    "`python -m workbench.study doctor` delivers it",
                    self.name, self._away or "it does not answer", self._outbox.folder,
                )  # fmt: skip
            if self._outbox.refused:
                log.warning("run %s: what the store refused is kept in %s", self.name, self._outbox.folder)
        return not self._outbox.waiting and not self._outbox.refused

    def close(self, state: str, reason: str = "", patience: float = 60.0) -> bool:
        """`finish` and `end` together. A complete run that cannot be tracked ends as failed.

        A run that did not complete records its end before it waits for anything, since its process may soon be killed.

        Returns:
            Whether everything was delivered.
        Raises:
            Failure: a complete run could not be tracked. Where the run had failed anyway, this is a warning.
        """
        try:
            if state == "complete":
                self.finish(patience)
            else:
                self._log_history()
        except Failure as error:
            if state == "complete":
                self.end("failed", str(error))
                raise
            log.warning("%s", error)
        return self.end(state, reason, patience)

    def _log_history(self) -> None:
        if self._rows and not self._attached:
            self._attached = True
            with self._outbox.file("artifact", HISTORY, folder=None) as path:
                history(self._rows).write_parquet(path)

    def _raise_if_refused(self) -> None:
        if self._outbox.refused:
            raise Failure(f"tracking of run {self.name} failed: {self._outbox.refused}")

    def _wait_until_delivered(self, patience: float) -> bool:
        """Wait until everything is delivered; False after `patience` seconds without progress.

        Uploads of files are waited for however long they take, as long as the store answers.
        """
        self._urgent = True
        self._wake.set()
        accepted, since = -1, 0.0
        with self._attempted:
            while self._outbox.waiting:
                if self._over:
                    return False
                if self._outbox.accepted != accepted:
                    accepted, since = self._outbox.accepted, time.monotonic()
                uploading = self._outbox.delivering in FILES and not self._away
                if time.monotonic() - since > patience and not uploading:
                    self._gave_up = True
                    return False
                # Not only woken: one delivery may take long, and shows its progress by what has been accepted.
                self._attempted.wait(0.2)
        return True

    def _deliver(self) -> None:
        """The thread: deliver what waits, at intervals, until the run is over."""
        pause = self._seconds
        while True:
            self._wake.wait(pause)
            # Before the delivery: what is logged during it wakes the thread once more.
            self._wake.clear()
            if self._over:
                break
            try:
                deliver_outbox(self.client, self._outbox)
                if self._away:
                    log.warning("run %s: the tracking store is back", self.name)
                self._away, pause = "", self._seconds
            except Exception as error:  # of any kind: nothing is lost as long as delivery is retried
                if not self._away:
                    pause = 0.5
                    log.warning(
                        "run %s: the tracking store is away (%s); what the run logs is kept in %s until it is back",
                        self.name, in_short(error), self._outbox.folder,
                    )  # fmt: skip
                self._away = in_short(error)
                # A process that waits for its end notices within two seconds that the store is back.
                pause = min(2 * pause, 2.0 if self._urgent else 15.0)
            with self._attempted:
                self._attempted.notify_all()
        # By this thread and not by `end`, which may give up waiting: the lock is held as long as a delivery may be
        # under way.
        self._outbox.close()


def history(rows: Mapping[int, Mapping[str, float]]) -> pl.DataFrame:
    """A run's metrics as one wide frame: `step`, then a column a metric, sorted."""
    names = sorted({name for row in rows.values() for name in row})
    columns = {name: [rows[step].get(name) for step in sorted(rows)] for name in names}
    return pl.DataFrame({"step": sorted(rows)} | columns, schema={"step": pl.Int64} | {n: pl.Float64 for n in names})
