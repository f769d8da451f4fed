"""A study opened in this process, as its workers find it."""

from workbench import tracking
from workbench.studies import lifecycle, workers
from workbench.studies.storage import locked
from workbench.tracking import study_runs
from workbench.training.config import resolve


class Line:
    """What a worker says."""

    def __init__(self):
        self.said = []

    def send(self, what):
        self.said.append(what)


def made(settings, name="s"):
    """A study, its run, and what a worker of it is told."""
    url, config = lifecycle.storage_url(), resolve(settings)
    client = tracking.connect()
    with locked(url):
        study = lifecycle.open_study(config, settings, lifecycle.arms_of(config, settings), name, url)
        parent = study_runs.open_study(client, name, "note")
    return study, client, workers.Worker(settings, name, url, parent, 0, study.user_attrs["asked"])


def steps_of(client, trial):
    points = client.get_metric_history(trial.user_attrs["run_id"], "train/loss")
    return [point.step for point in points]
