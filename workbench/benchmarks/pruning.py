"""What pruning saves the default sweep. Sweeps that an earlier call has finished are not run again."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from scipy.stats import ttest_1samp

from workbench.benchmarks import sandbox
from workbench.benchmarks.figure import Figure, Options, figure
from workbench.studies.synthetic import trial_times

WHOLE = "sweep.pruner=NopPruner"


def pruning(options: Options) -> Iterator[Figure]:
    """The default sweep as it is and with nothing pruned, the same seeds: steps taken, best value found."""
    folder = options.folder / f"pruning-{sandbox.experiment_digest('default.toml')}"
    saved, better = [], []
    for seed in range(options.sweeps):
        steps, best = [], []
        for name, settings in (("whole", [WHOLE]), ("pruned", [])):
            study = f"{name}-{seed}"
            sandbox.sweep(folder, study, "default.toml", 2, f"seed={seed}", f"sweep.seed={seed}", *settings)
            trials = trial_times(study, sandbox.databases(folder)["WORKBENCH_STORAGE"])
            steps.append(sum(trial.steps for trial in trials))
            best.append(max(trial.value for trial in trials if trial.value is not None))
        saved.append(100 * (1 - steps[1] / steps[0]))
        better.append(best[1] - best[0])
    note = f"seeds 0 to {options.sweeps - 1}"
    yield figure("pruning", "pruning: steps saved of the default sweep", saved, 35, unit="%", at_least=True, note=note)
    name = "pruning: best win rate, with it minus without"
    gap = figure("pruning", name, better, 0, unit="", at_least=True, note=f"{note}; missed where a t test says below 0")
    # One image more or less is within the noise of few seeds, of which a median knows nothing.
    yield replace(gap, met=_not_below_zero(better))


def _not_below_zero(values: Sequence[float]) -> bool | None:
    """Whether a mean is not below 0 by a one-sided t test at 5 %; None where fewer than three values say nothing."""
    if len(values) < 3:
        return None
    if min(values) == max(values):  # the test needs a spread
        return values[0] >= 0
    return bool(ttest_1samp(values, 0, alternative="less").pvalue >= 0.05)
