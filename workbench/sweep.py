"""`python -m workbench.sweep`: run or resume a study."""

from contextlib import nullcontext
from pathlib import Path

import click

from workbench.common.command_line import (
    command,
    default_workers,
    experiment_argument,
    one_process,
    set_option,
    this_python,
    workers_option,
)
from workbench.common.errors import UserError
from workbench.common.paths import shipped
from workbench.common.validation import study_name
from workbench.training.settings_option import settings_option

DEFAULT = shipped("experiments/default.toml")


@experiment_argument
@click.option("--study", metavar="NAME", help="The study's name; an existing one goes on. Default: the file's name.")
@click.option("--trials", type=click.IntRange(1), help="Finished trials in all (overrides sweep.trials).")
@workers_option
@click.option("--init", is_flag=True, help="Make the study and stop, for many commands to work on it at once.")
@set_option
@settings_option
def main(
    experiment: Path | None,
    study: str | None,
    trials: int | None,
    workers: int | None,
    init: bool,
    overrides: tuple[str, ...],
) -> None:
    """Run the study that an experiment file declares, or go on with it.

    Without a file: experiments/default.toml, the small model that comes with the workbench. The first trials are
    the declared arms (the paper's own methods), then Optuna's sampler takes over. Finished trials are never
    repeated; Ctrl-C ends cleanly, and the same command resumes.

    \b
    Examples:
      python -m workbench.sweep
      python -m workbench.sweep --study wide --trials 40 --workers 4
      python -m workbench.sweep experiments/claims.toml --study mine --set train.steps=200

    Tracks to $MLFLOW_TRACKING_URI (default: mlflow.db here); the study lies in $WORKBENCH_STORAGE (default:
    optuna.db here).
    """
    path = experiment or DEFAULT
    name = study_name(path.stem if study is None else study)
    one_process()
    from workbench.training.config import merge
    from workbench.training.experiment_file import parse_override, read

    extra = dict(parse_override(text) for text in overrides)
    if trials is not None:
        extra["sweep.trials"] = trials
    from workbench.studies.experiment import Experiment
    from workbench.studies.pool import WorkerPool

    declared = Experiment.resolve(merge(read(path), extra))
    workers = 0 if init else workers or default_workers(declared.config.model.device)
    # Workers start as soon as all settings are known to be right, and import beside this process. Not where a search
    # tunes the arms first: each of its rounds has workers of its own, and the study's settings follow from it.
    tuned = bool(declared.declared_sweep.tuning.factors)
    try:
        with nullcontext() if tuned else WorkerPool(declared, workers) as pool:
            from workbench.studies import lifecycle

            lifecycle.run_study(declared, name, workers, pool)
    except KeyboardInterrupt:
        click.echo(f"Stopped; finished trials of study {name!r} are kept. To go on: the same command again.", err=True)
        raise
    # Imported now: its statistics take a second, and the study's first step would wait for them.
    from workbench import tracking
    from workbench.analysis.claims import regime

    try:
        outside = "" if init else regime.sentence(regime.of_study(name), regime.RUNS)
    except UserError:  # no trial has ended: other commands may have taken all, and still be at work on them
        outside = ""
    if outside:
        click.echo(f"\n{outside}")
    click.echo(
        f"\nOpen the UI:       {tracking.ui_command()}\n                   {tracking.ui_link(tracking.connect(), name)}"
    )
    click.echo(f"Make the figures:  {this_python()} -m workbench.report --study {name}")


main = command(main)

if __name__ == "__main__":
    main()
