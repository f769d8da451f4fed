"""The only room that knows MLflow: runs written by a background thread, and read back as data frames.

A study is a parent run of the experiment, a trial a child run. Metrics reach the tracking store in batches from
a writer thread, so the training loop never waits; the same rows go up as one wide `history.parquet` a run, which
is what notebooks read.
"""

from workbench.tracking.delivery import deliver, reaching, undelivered, wait_until_reachable
from workbench.tracking.frames import load_history, load_runs, load_samples, load_sheets
from workbench.tracking.kept_models import add_scores, kept_model, kept_models
from workbench.tracking.reconcile import agree, bury_dead, finished, restore_history, runs_of_trials, without_history
from workbench.tracking.store import (
    Client,
    attach,
    connect,
    experiment,
    find_study,
    finish_study,
    is_complete,
    link_claims,
    open_study,
    require_study,
    studies,
    tracking_uri,
    ui_command,
    ui_evaluations,
    ui_link,
)
from workbench.tracking.tracker import Tracker, history

__all__ = [
    "Client",
    "Tracker",
    "add_scores",
    "agree",
    "attach",
    "bury_dead",
    "connect",
    "deliver",
    "experiment",
    "find_study",
    "finish_study",
    "finished",
    "history",
    "is_complete",
    "kept_model",
    "kept_models",
    "link_claims",
    "load_history",
    "load_runs",
    "load_samples",
    "load_sheets",
    "open_study",
    "reaching",
    "require_study",
    "restore_history",
    "runs_of_trials",
    "studies",
    "tracking_uri",
    "ui_command",
    "ui_evaluations",
    "ui_link",
    "undelivered",
    "wait_until_reachable",
    "without_history",
]
