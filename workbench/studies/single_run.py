"""A run that belongs to no trial: trained with a progress bar, tracked, and kept so that it can go on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from workbench.common import distributed
from workbench.common.errors import Failure
from workbench.common.progress import Progress
from workbench.studies import training_bar
from workbench.training.config import Config, distinguishing
from workbench.training.listener import Listener
from workbench.training.preparation import Prepared
from workbench.training.provenance import datasets, describe, provenance
from workbench.training.run import execute
from workbench.training.snapshots import Finished, Snapshots

SHOWN = ("eval/reward", "eval/win_rate", "validation/margin", "divergence/policy", "divergence/reference")


@dataclass(frozen=True)
class SingleRun:
    """What a run that belongs to no trial is made of, whatever listens to it.

    Attributes:
        save_to: folder for the trained model; None = it is not saved.
        goes_on: whether the run may go on to a later end, since people know its name.
        again: what makes a stopped run go on, in words.
        kept: called once the run is trained and its model saved, before anything else records its end.
        shown_as: what messages call `save_to`, where it is a folder beside the person's.
    """

    config: Config
    prepared: Prepared
    label: str
    snapshots: Snapshots | None
    stopping: Callable[[], bool]
    save_to: Path | None
    goes_on: bool
    again: str
    kept: Callable[[], None] = lambda: None
    shown_as: Path | None = None

    def execute(
        self,
        listener: Listener,
        on_step: Callable = lambda step, metrics: None,
        on_evaluated: Callable[[float], object] = lambda share: None,
    ) -> dict[str, float]:
        """Train, from the newest snapshot where there is one; returns the last value of every metric."""
        return execute(
            self.config,
            self.prepared,
            listener,
            on_step=on_step,
            on_evaluated=on_evaluated,
            save_to=self.save_to,
            shown_as=self.shown_as,
            snapshots=self.snapshots,
            stopping=self.stopping,
        )


def tracked(
    run: SingleRun,
    study: str | None,
    note: str = "single runs.",
    params: Mapping[str, Any] | None = None,
    output: Path | None = None,
) -> None:
    """Train and track the run with MLflow.

    Args:
        study: to whose runs it belongs, made where it is missing; None = it stands alone.
        note: what the description of a study that is made says of it.
        params: to be tracked beside the run's settings.
        output: as for `train`.
    Raises:
        Failure: the run is trained, but the tracking store has not accepted all of it.
    """
    # Imported here: machines without MLflow train too, and keep their runs in folders.
    from workbench import tracking
    from workbench.tracking import reconcile, study_runs, tags, ui

    client = tracking.connect()
    # Runs whose process was killed say RUNNING for ever, unless the next command ends them.
    reconcile.close_dead_runs(client)
    group = study_runs.open_group(client, study, f"Study **{study}**: {note}") if study else None
    about = provenance() | {
        tags.PROCESSES: str(distributed.world()),
        tags.KIND: "run",
        tags.ARM: run.label,
        tags.NOTE: describe(run.config),
    }
    if group:
        about |= study_runs.membership(group)
    data, settings, more = datasets(run.prepared), run.config.flat(), dict(params or {})
    tracker = tracking.Tracker(
        client, run.label, params=distinguishing(settings) | more, settings=settings | more, tags=about, datasets=data
    )
    if not train(run, tracker, tracker.close, output):
        raise Failure(f"run {run.label} is trained, but the tracking store is away: python -m workbench.study doctor")
    click.echo(f"\nOpen the UI: {tracking.ui_command()}\n             {ui.run_link(client, tracker.run_id)}")


def train(run: SingleRun, listener: Listener, close: Callable[[str, str], bool], output: Path | None) -> bool:
    """Train with a progress bar, and show the most important metrics at the end.

    Args:
        close: ends the listener's run in a state and for a reason, and says whether everything was delivered.
        output: where the person finds the trained model.
    Returns:
        What `close` says.
    """
    snapshots, steps = run.snapshots, run.config.train.steps
    bar = Progress(total=steps, desc=run.label, unit="step")
    on_step, on_evaluated = training_bar.following(bar, steps)
    state, reason, delivered = "failed", "", True
    try:
        final = run.execute(listener, on_step, on_evaluated)
        run.kept()
        state = "complete"
    except KeyboardInterrupt:
        state = "interrupted"
        if snapshots and snapshots.steps():
            click.echo(f"\nStopped; a snapshot of step {snapshots.steps()[0]} is kept. To go on: {run.again}", err=True)
        raise
    except Exception as error:
        reason = str(error)
        if snapshots and isinstance(error, FloatingPointError):  # it would end there again
            snapshots.discard()
        raise
    finally:
        bar.close()
        delivered = close(state, reason)
        # Last: a run whose end could not be stored can still be resumed, or made again, from its snapshots.
        if snapshots and state == "complete":
            _keep_end(run, snapshots, output)
    for metric in SHOWN:
        if metric in final:
            click.echo(f"{metric:22s} {final[metric]:.4f}")
    return delivered


def _keep_end(run: SingleRun, snapshots: Snapshots, output: Path | None) -> None:
    """Keep of a run that has ended what a later end needs; nothing where nobody could name it."""
    if run.goes_on:
        place = str(output.resolve()) if output else ""
        snapshots.finish(Finished(run.config.train.steps, run.config.flat(), place))
    else:
        snapshots.discard()
