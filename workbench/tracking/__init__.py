"""The only package that knows MLflow: runs are written by a background thread and read back as data frames.

A study is a parent run of the workbench's experiment, a trial is a child run. Metrics reach the tracking store in
batches from a thread, so that the training loop never waits. The same rows go up as one wide `history.parquet` a run,
which is what notebooks read.

What most callers need is here. Studies also use `study_runs` (parent runs), `delivery` (outboxes of dead processes) and
`reconcile` (runs that disagree with their trials); `tags` names every tag.
"""

from workbench.tracking.frames import load_history, load_lost, load_runs, load_samples, load_sheets
from workbench.tracking.kept_models import add_scores, kept_model, kept_models
from workbench.tracking.overview import attach
from workbench.tracking.store import Client, connect, connect_to_read, import_stores, tracking_uri
from workbench.tracking.study_runs import Run
from workbench.tracking.tracker import Tracker, history
from workbench.tracking.ui import ui_command, ui_link

__all__ = [
    "Client",
    "Run",
    "Tracker",
    "add_scores",
    "attach",
    "connect",
    "connect_to_read",
    "history",
    "import_stores",
    "kept_model",
    "kept_models",
    "load_history",
    "load_lost",
    "load_runs",
    "load_samples",
    "load_sheets",
    "tracking_uri",
    "ui_command",
    "ui_link",
]
