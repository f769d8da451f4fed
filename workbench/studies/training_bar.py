"""What stands beside a bar of trainings: the numbers that tell, while it runs, whether it is worth waiting for."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from workbench.common.progress import Progress

if TYPE_CHECKING:  # a run of its own has the bar too, on machines without Optuna
    from optuna import Study

#: Metrics of a run, each with its name beside the bar.
SHOWN = {"train/loss": "loss", "rewards/accuracies": "accuracy", "divergence/policy": "divergence"}


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of a step's metrics that a bar shows, by their names there."""
    return {name: metrics[metric] for metric, name in SHOWN.items() if metric in metrics}


def show(bar: Progress, *runs: Mapping[str, float], best: float | None = None) -> None:
    """Put numbers beside a bar, without drawing it anew: means over the runs that are under way.

    Args:
        runs: the latest numbers of each, of `shown`.
        best: value of a study's best trial so far.
    """
    names = [name for name in SHOWN.values() if any(name in run for run in runs)]
    means = {name: _mean(run[name] for run in runs if name in run) for name in names}
    told = means if best is None else {"best": best} | means  # first: a narrow terminal cuts the line's end
    bar.set_postfix({name: f"{value:.3g}" for name, value in told.items()}, refresh=False)


def following(bar: Progress, steps: int) -> tuple[Callable[[int, Mapping[str, float]], None], Callable[[float], None]]:
    """What moves the bar of one training: `on_step` and `on_evaluated` of `workbench.training.run.execute`."""
    measured: dict[str, float] = {}  # divergence comes with the diagnostics alone, and stays until the next

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        bar.update(step - bar.n)
        measured.update(shown(metrics))
        show(bar, measured)
        bar.phase("training" if step < steps else "evaluating")

    def on_evaluated(share: float) -> None:
        bar.phase(f"evaluating {100 * share:.0f} %")

    return on_step, on_evaluated


def best_so_far(study: "Study") -> float | None:
    """Value of a study's best trial within its constraints; None before the first, and with several objectives."""
    if len(study.directions) > 1:
        return None
    found = study.best_trials
    return found[0].value if found else None


def _mean(values: Iterable[float]) -> float:
    several = list(values)
    return sum(several) / len(several)
