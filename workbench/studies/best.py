"""A trial's model as a folder: trained again with the trial's settings and seed, to the same weights."""

from collections.abc import Callable
from pathlib import Path

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from workbench.common import locks
from workbench.common.errors import UserError
from workbench.common.progress import Progress
from workbench.models import ASSETS
from workbench.studies import training_bar
from workbench.studies.records import StudyRecord
from workbench.studies.recovery import best_folder
from workbench.studies.trials import counts
from workbench.training.config import Config
from workbench.training.listener import NullListener
from workbench.training.model_folder import ModelFolder
from workbench.training.preparation import prepare
from workbench.training.run import execute
from workbench.training.snapshots import Snapshots


def chosen_trial(study: Study, number: int | None) -> FrozenTrial:
    """The trial of that number, or the best complete one within the study's constraints.

    Raises:
        UserError: there is no such trial, or several objectives have no single best.
    """
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE and counts(t)]
    if number is not None:
        named = [trial for trial in complete if trial.number == number]
        if not named:
            there = ", ".join(str(trial.number) for trial in complete) or "none yet"
            raise UserError(f"--trial {number}: no complete trial of study {study.study_name!r}; complete are: {there}")
        return named[0]
    best = study.best_trials  # within the constraints
    if not best:
        raise UserError(f"study {study.study_name!r}: no trial is complete and within the constraints")
    if len(study.directions) > 1:
        front = ", ".join(str(trial.number) for trial in best)
        raise UserError(
            f"study {study.study_name!r} has several objectives; choose with --trial, of the front: {front}"
        )
    return best[0]


def folder_for(config: Config, study: Study, number: int, output: Path) -> ModelFolder:
    """The folder for a trial's model.

    Raises:
        UserError: something else is in it, or it cannot be written.
    """
    model = ModelFolder(output, _state_of(study, number), config)
    model.require_free("--output")
    return model


def _state_of(study: Study, number: int) -> Path:
    return best_folder(study.study_name, StudyRecord.of(study).token, number)


def retrain(
    config: Config,
    study: Study,
    number: int,
    model: ModelFolder,
    *,
    stopping: Callable[[], bool],
) -> dict[str, float] | None:
    """Train as a trial did, with a progress bar, and save the model; stopped or killed, the same call goes on.

    Args:
        config: the trial's configuration.
        model: what `folder_for` returns; becomes a diffusers folder.
        stopping: whether to stop; asked before each batch.
    Returns:
        The last value of every metric; those of the trial, where machine and library versions are the same. None where
        the same call has put the model there before, and was killed at its very end.
    Raises:
        UserError: another command does the same already.
        Failure: the model cannot be put into its folder.
        KeyboardInterrupt: it was stopped.
    """
    snapshots = Snapshots(_state_of(study, number), config.snapshots.interval, config.snapshots.keep)
    with locks.try_lock(snapshots.folder) as free:
        if not free:
            raise UserError(f"trial {number} of study {study.study_name!r} is being trained again by another command")
        final = None
        model.clear()
        if not model.has_model:
            prepared = prepare(config)
            model.require_data(prepared.data)
            with Progress(total=config.train.steps, desc=f"trial {number}", unit="step") as bar:
                on_step, on_evaluated = training_bar.following(bar, config.train.steps)
                final = execute(
                    config,
                    prepared,
                    NullListener(),
                    on_step=on_step,
                    on_evaluated=on_evaluated,
                    save_to=model.beside,
                    shown_as=model.path,
                    snapshots=snapshots,
                    stopping=stopping,
                )
            model.place()
        # Once the model is saved: until then, a repetition goes on from the last snapshot.
        snapshots.discard()
    return final


def how_to_draw(output: Path, config: Config) -> str:
    """Lines of plain diffusers that draw with what was saved."""
    load = f'pipe = DiffusionPipeline.from_pretrained("{output}")'
    if config.lora.rank:
        # Where this installation has it: the command may be called from any folder.
        base = str(ASSETS / "model") if config.model.path == "embedded" else config.model.path
        options = {key: getattr(config.model, key) for key in ("revision", "variant")}
        given = "".join(f', {key}="{value}"' for key, value in options.items() if value)
        load = f'pipe = DiffusionPipeline.from_pretrained("{base}"{given})\n  pipe.load_lora_weights("{output}")'
    return (
        f"Draw with it:\n  from diffusers import DiffusionPipeline\n  {load}\n"
        '  pipe("a fox on a blue background, noto style").images[0].save("fox.png")'
    )
