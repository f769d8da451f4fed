"""A study with all that runs keep, and nothing trained: what figures and reports are timed on."""

import os

import numpy as np

from workbench import tracking
from workbench.benchmarks.sandbox import EXPERIMENTS
from workbench.data.rows import read_prompts
from workbench.studies.experiment import Experiment
from workbench.studies.synthetic import invented_trials
from workbench.tracking import study_runs, tags
from workbench.training.config import Config
from workbench.training.experiment_file import read
from workbench.training.measurements import metric_names


def invent(study: str, runs: int, steps: int = 128) -> None:
    """Make a study of the claims' arms, each with some seeds, and of sampled trials, in the environment's databases.

    Args:
        steps: of each run.
    """
    settings = read(EXPERIMENTS / "claims.toml")
    space = read(EXPERIMENTS / "default.toml")["sweep.space"]
    seeds = list(range(max(1, runs // (len(settings["sweep.arms"]) + 1))))
    settings |= {"sweep.space": space, "sweep.trials": runs, "sweep.seeds": seeds}
    experiment, client, rng = Experiment.resolve(settings), tracking.connect(), np.random.default_rng(0)
    trials = invented_trials(experiment, study, os.environ["WORKBENCH_STORAGE"], runs)
    parent = study_runs.open_group(client, study, "").info.run_id
    for trial in trials:
        about = {tags.KIND: "trial", tags.STUDY: study, tags.TRIAL: str(trial.number), tags.ARM: trial.arm}
        tracker = tracking.Tracker(
            client, trial.name, params=trial.config.flat(), tags=about, parent=parent, flush=10**9
        )
        trial.finish(_report(tracker, trial.config, steps, rng))
        tracker.close("complete")
    study_runs.finish_study(client, parent, {}, "", "complete")


def _report(tracker: tracking.Tracker, config: Config, steps: int, rng: np.random.Generator) -> dict[str, float]:
    """Report what a run reports: metrics of all steps, samples and their scores, what the reference did.

    Returns:
        The last value of each metric.
    """
    names = sorted(metric_names(config))
    last: dict[str, float] = {}
    rare = [name for name in names if name.startswith(("validation", "divergence/policy", "kl/policy"))]
    final = [name for name in names if name.startswith(("timestep_", "eval/", "divergence/reference_unseen"))]
    often = sorted({*names} - {*rare, *final})
    # As often as a run reports them: some metrics at every step, diagnostics every 16, final ones once.
    for step in range(1, steps + 1):
        due = often + (rare if step % 16 == 0 else []) + (final if step == steps else [])
        last |= dict(zip(due, rng.uniform(0.01, 1, len(due)).tolist(), strict=True))
        tracker.log(step, {name: last[name] for name in due})
    captions, draws = list(read_prompts("embedded")), config.evaluation.seeds
    scores = rng.normal(-2, 1, (4, draws * len(captions))).tolist()
    columns: dict[str, list] = {"caption": captions * draws, "seed": [seed for seed in range(draws) for _ in captions]}
    kinds = ("reward", "pretrained_reward", "judge", "pretrained_judge")
    tracker.table("samples.json", columns | dict(zip(kinds, scores, strict=True)))
    tracker.table("reference_audit.json", {"step": list(range(8, 8 * 16 + 1, 8)), "moved": [1.0] * 16})
    for file in ("samples.png", "pretrained.png"):
        tracker.picture(file, rng.integers(0, 256, (32 * draws, 32 * len(captions), 3), dtype=np.uint8))
    return last
