"""What a study needs before it is created: its settings checked beyond themselves, and what its runs share prepared."""

import difflib

from workbench.common.errors import UserError
from workbench.common.progress import drawn_by_worker
from workbench.studies.experiment import Experiment
from workbench.training.measurements import metric_names
from workbench.training.preparation import Preparations, require_sources
from workbench.training.run import check as check_run


def check(experiment: Experiment, sources: bool) -> None:
    """Find mistakes before anything is made.

    Args:
        sources: look for prompts and pairs too, which a machine that only creates a study may not have.
    Raises:
        UserError: the model, a metric, or prompts or pairs are not there or not what they should be.
        Failure: the hub does not answer.
    """
    config = experiment.config
    logged = metric_names(config)
    for key, metric in experiment.sweep.metrics:
        if metric not in logged:
            usual = sorted(logged & {"eval/win_rate", "eval/reward", "validation/margin"})
            close = difflib.get_close_matches(metric, logged, 3) or usual
            raise UserError(f"sweep.{key} = {metric!r}: runs log no such metric (try {', '.join(close)})")
    if sources:
        require_sources(config)


def prepare(experiment: Experiment, preparations: Preparations) -> None:
    """Make what runs share before workers want it, and find what is wrong with the data.

    Raises:
        UserError, Failure: as `training.preparation.prepare`, and where a run could not begin with these data.
    """
    with drawn_by_worker():
        check_run(experiment.config, preparations(experiment.config))
