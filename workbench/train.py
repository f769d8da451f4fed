"""`python -m workbench.train`: one run, tracked or kept in a folder."""

import json
import os
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import click

from workbench.common.command_line import command, experiment_argument, set_option, silence_transformers
from workbench.common.validation import checked_name, study_name, writable_folder
from workbench.training.settings_option import settings_option

if TYPE_CHECKING:
    from workbench.studies.single_run import SingleRun
    from workbench.training.config import Config
    from workbench.training.snapshots import Snapshots


@experiment_argument
@click.option("--study", metavar="NAME", help="Put the run into this study; default: it stands alone.")
@click.option(
    "--name", metavar="NAME", help="The run's name. Default: the file's, the time, and eight random letters and digits."
)
@click.option("--resume", is_flag=True, help="Go on from the last snapshot of the run called --name, if there is one.")
@click.option("--output", type=click.Path(path_type=Path), help="Save the trained model here, as a diffusers folder.")
@click.option(
    "--no-tracking", is_flag=True,
    help="Keep the run in --output instead: history.parquet, pictures, tables, and the trained model in model/.",
)  # fmt: skip
@set_option
@settings_option
def main(
    experiment: Path | None,
    study: str | None,
    name: str | None,
    resume: bool,
    output: Path | None,
    no_tracking: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train once with an experiment file's settings and track the run; its sweep section is not used.

    Without a file: the defaults, which are the paper's update with a threshold on the small model.

    Snapshots are taken every `snapshots.interval` steps, and when the run is stopped by Ctrl-C or SIGTERM. With
    --resume a run that was killed goes on from the last of them, to the same bits; give a batch job --name and
    --resume, and it may be started again as often as it likes. A run that has ended is left as it is, unless
    train.steps is larger now: then it goes on to that end.

    \b
    Examples:
      python -m workbench.train --set reference.policy=frozen
      python -m workbench.train experiments/default.toml --set train.steps=256 --output trained/
      python -m workbench.train --set lora.rank=8 --set train.lr=3e-4 --output lora/
      python -m workbench.train --name first --resume
      python -m workbench.train --name first --resume --set train.steps=512
      python -m workbench.train --no-tracking --output run/      (needs no MLflow, polars, Optuna or datasets)
      torchrun --nproc-per-node 2 -m workbench.train        (or: accelerate launch -m workbench.train)
    """
    from workbench.common.errors import UserError
    from workbench.training.experiment_file import load, parse_override

    config = load(experiment, dict(parse_override(text) for text in overrides))
    if resume and not name:
        raise UserError("--resume: say with --name which run")
    name = checked_name("--name", name) if name is not None else None
    study = study_name(study) if study is not None else None
    if no_tracking and (output is None or study is not None):
        raise UserError("--no-tracking: needs --output for the run's files, and belongs to no --study")
    from workbench.common import distributed, locks, paths
    from workbench.common.signals import PATIENCE, stop_on_signals
    from workbench.studies.single_run import SingleRun, tracked
    from workbench.training.listener import NullListener
    from workbench.training.model_folder import ModelFolder
    from workbench.training.preparation import prepare
    from workbench.training.run import check
    from workbench.training.snapshots import Snapshots

    # Options and settings are checked before this: it imports diffusers and transformers, which takes seconds.
    silence_transformers()
    paths.require_places()
    # On several processes only runs with a name have snapshots: each would call itself by its own time.
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment.stem)[:60] if experiment else "train"
    # The random end tells runs apart that begin in the same second, as those of a job array do on its machines. Four
    # digits of it would be the same for two of a hundred runs in 7 % of such arrays.
    label = name or f"{stem}-{time.strftime('%m%d-%H%M%S')}-{uuid4().hex[:8]}"
    snapshots = None
    if name or distributed.world() == 1:
        snapshots = Snapshots(paths.state_path("runs", label), config.snapshots.interval, config.snapshots.keep)
    with ExitStack() as stack:
        if distributed.is_main() and snapshots:
            # The lock before anything is read: two commands of one name must not go on from the same snapshot.
            if not stack.enter_context(locks.try_lock(snapshots.folder)):
                raise UserError(f"--name {label}: a run of that name is at work")
            if not resume:
                _require_new(label, snapshots)
        if resume and snapshots and _has_ended(label, snapshots, config, output):
            return
        model = None
        if output is not None and no_tracking:
            if distributed.is_main():  # better now than after the training
                _require_own(output, label if resume else None)
        elif output is not None:
            # Only a run that goes on has put a model there before.
            model = ModelFolder(output, snapshots.folder if snapshots else None, config, known=resume)
            if distributed.is_main():
                model.require_free("--output")
                model.clear()
        if distributed.is_main() and not no_tracking:
            from workbench.tracking.artifacts import require_trackable

            require_trackable()
        if distributed.is_main():
            click.echo(f"{label}: preparing: encoding pairs, drawing the pretrained model's samples ...", err=True)
        prepared = prepare(config)
        check(config, prepared)
        if model:
            model.require_data(prepared.data)
        patience = PATIENCE + (10 if distributed.world() > 1 else 0)  # several ask each other less often
        # From here on a signal asks the run to take a snapshot and stop. Before, it ends the process: nothing is lost.
        stopping = stack.enter_context(stop_on_signals("SIGINT", "SIGTERM", "SIGHUP", patience=patience))
        again = f"the same command with --name {label} --resume"
        run = SingleRun(config, prepared, label, snapshots, stopping, output, goes_on=bool(name), again=again)
        if model:
            run = replace(run, save_to=model.beside, kept=model.place, shown_as=output)
        if not distributed.is_main():
            run.execute(NullListener())
        elif output and no_tracking:
            _in_folder(run, output)
        else:
            tracked(run, study, output=output)


def _require_new(label: str, snapshots: "Snapshots") -> None:
    """Refuse to begin a run anew that was stopped; what is kept of one that has ended is removed.

    Raises:
        UserError: a run of that name was stopped.
    """
    from workbench.common.errors import UserError

    if snapshots.finished():
        snapshots.discard()
    elif snapshots.steps():
        raise UserError(
            f"--name {label}: a run of that name was stopped after step {snapshots.steps()[0]}; go on with "
            "--resume, or choose another name"
        )


def _has_ended(label: str, snapshots: "Snapshots", config: "Config", output: Path | None) -> bool:
    """Whether a run has come to the end that it is to have, so that there is nothing to do; says so.

    Raises:
        UserError: it was made with other settings, is longer, or is not in `output`.
    """
    from workbench.common import distributed
    from workbench.common.errors import UserError
    from workbench.common.files import holds_something
    from workbench.training.config import completed
    from workbench.training.snapshots import require_same

    finished = snapshots.finished()
    if finished is None:
        return False
    # Both as JSON, as the stored ones were: it knows no tuples.
    stored, now = (json.loads(json.dumps(each)) for each in (completed(finished.settings), config.flat()))
    require_same(stored, now, str(snapshots.folder))
    if config.train.steps > finished.steps:
        return False
    if config.train.steps < finished.steps:
        raise UserError(
            f"train.steps = {config.train.steps}: run {label} has ended after {finished.steps}; give more, or begin "
            "anew under another name"
        )
    # Of several machines only that of the main process has the model.
    is_there = bool(finished.output) and (not distributed.is_main() or holds_something(Path(finished.output)))
    if output is not None and not (is_there and os.path.realpath(output) == finished.output):
        saved = f"its model was put into {finished.output}" if finished.output else "its model was not saved"
        if finished.output and not is_there:
            saved += ", where it is not any more"
        raise UserError(f"--output {output}: run {label} has ended already, and {saved}; choose another --name")
    click.echo(
        f"Run {label} has ended after its {finished.steps} steps; there is nothing to do. To go on: raise train.steps"
    )
    return True


def _require_own(output: Path, label: str | None) -> None:
    """Refuse an output folder that holds something else.

    Args:
        label: the run whose earlier part the folder may hold; None = it must be empty.
    Raises:
        UserError: there is something else in it, or it cannot be written.
    """
    from workbench.common.errors import UserError
    from workbench.training.run_folder import run_in

    if any(writable_folder("--output", output).iterdir()) and (label is None or run_in(output) != label):
        other = "not an empty folder" if label is None else f"neither empty nor the folder of run {label}"
        raise UserError(f"--output {output}: {other}; choose a new one")


def _in_folder(run: "SingleRun", output: Path) -> None:
    """Train and keep the run in a folder."""
    from workbench.common.files import partial_file, replace_folder
    from workbench.studies.single_run import train
    from workbench.training.provenance import datasets, provenance
    from workbench.training.run_folder import RunFolder

    data = {split: {"digest": digest, **counts} for split, (digest, counts) in datasets(run.prepared).items()}
    about = {"name": run.label, "settings": run.config.flat(), "versions": provenance(), "data": data}
    folder, model = RunFolder(output, about), output / "model"
    with partial_file(model) as fresh:  # an earlier part of the run may have left its model there

        def close(state: str, reason: str) -> bool:
            if state == "complete":
                # The model before the state: a folder that says complete has it.
                replace_folder(fresh, model)
            return folder.close(state, reason)

        train(replace(run, save_to=fresh, shown_as=model), folder, close, output)
    click.echo(f"\n{output}")


main = command(main)

if __name__ == "__main__":
    main()
