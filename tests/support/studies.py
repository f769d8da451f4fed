"""A study opened in this process, as its workers find it."""

from contextlib import ExitStack

from workbench import tracking
from workbench.common.paths import storage_url
from workbench.studies import lifecycle, workers
from workbench.studies.experiment import Experiment


class Events:
    """The end of a pipe to which a worker sends its events."""

    def __init__(self):
        self.sent = []

    def send(self, event):
        self.sent.append(event)


def made(settings, name="s"):
    """A study, a client of the tracking store, and the assignment of a worker."""
    url, experiment = storage_url(), Experiment.resolve(settings)
    client = tracking.connect()
    study, own, parent = lifecycle.start(experiment, name, url, client, ExitStack())
    return study, client, workers.Assignment(experiment, own, url, parent)


def steps_of(client, trial):
    points = client.get_metric_history(trial.user_attrs["run_id"], "train/loss")
    return [point.step for point in points]
