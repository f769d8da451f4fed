"""Rounds of one model: draw with the newest policy, score, pair, train, and again with what was trained.

    FOLDER/drawn/           every image that was drawn, with its scores
    FOLDER/2/pairs/         the second round's pairs: train.parquet, a sheet, agreement
    FOLDER/2/model/         what the second round trained
    FOLDER/2/round.json     the settings that it was made with; written last, so that a round that has it is whole

The pretrained model stays that of `model.path` in every round, so divergence and gains are measured from round 0.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from workbench.common import locks, paths
from workbench.common.errors import Failure, UserError, shown
from workbench.common.files import in_place, partial_file, replace_folder
from workbench.common.signals import PATIENCE, stop_on_signals
from workbench.common.validation import writable_folder
from workbench.evaluation import preferences
from workbench.evaluation.pairing import Rule
from workbench.models.safe_loading import read_json
from workbench.studies.single_run import SingleRun, tracked
from workbench.training.config import Config, completed, default_config, flatten, resolve
from workbench.training.preparation import prepare
from workbench.training.run import check
from workbench.training.snapshots import Snapshots

#: Settings of the rounds that decide nothing about the rounds before.
FREE = ("rounds.count", "rounds.batch_size")


@dataclass(frozen=True)
class Round:
    """One round of a folder, counted from 1.

    Attributes:
        settings: all that decides it, by dotted name.
    """

    number: int
    folder: Path
    declared: Config

    @property
    def place(self) -> Path:
        """The round's own folder."""
        return self.folder / str(self.number)

    @property
    def model(self) -> Path:
        """Where its trained model is, or will be."""
        return self.place / "model"

    @property
    def pairs(self) -> Path:
        """The folder of its pairs."""
        return self.place / "pairs"

    @property
    def before(self) -> "Round | None":
        """The round before; None for the first."""
        return Round(self.number - 1, self.folder, self.declared) if self.number > 1 else None

    @property
    def config(self) -> Config:
        """The settings of its training."""
        began = {
            f"model.{key}": str(self.before.model)
            for key in ("policy", "reference")
            if self.before and getattr(self.declared.rounds, key) == "previous"
        }
        return resolve(self.declared.flat() | round_settings(self.declared) | {"data.train": str(self.pairs)} | began)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides it, by dotted name, as JSON has it."""
        return _decisive(self.config.flat() | round_settings(self.declared))

    def is_whole(self) -> bool:
        """Whether it has come to its end.

        Raises:
            UserError: it was made with other settings, or its model has vanished.
        """
        record = self.place / "round.json"
        if not record.exists():
            return False
        stored, now = read_json(record, f"round {self.number}"), self.settings
        if not isinstance(stored, dict):
            raise UserError(f"{record}: damaged; remove it, and the round is made again")
        # A setting that came after the round was made has its default there, which changes nothing.
        stored = _decisive(round_settings(default_config()) | completed(stored))
        differing = sorted(name for name in stored.keys() | now.keys() if stored.get(name) != now.get(name))
        if differing:
            key = differing[0]
            raise UserError(
                f"{key} = {shown(now.get(key))}: round {self.number} of {self.folder} was made with "
                f"{shown(stored.get(key))} ({len(differing)} differ); choose another --output"
            )
        if not self.model.is_dir():
            raise UserError(
                f"round {self.number}: its model {self.model} has vanished; bring it back, or remove {self.place} and "
                "the rounds after it, and they are made again"
            )
        return True


def round_settings(config: Config) -> dict[str, Any]:
    """The settings of the rounds by dotted name."""
    return flatten({"rounds": config.rounds.model_dump()})


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a round is, by dotted name, as JSON has them (lists for tuples)."""
    return json.loads(json.dumps({name: value for name, value in settings.items() if name not in FREE}))


def run_rounds(config: Config, study: str, folder: Path) -> int:
    """Make the rounds that are not there yet; stopped at any time, the same call goes on where it was.

    Args:
        study: the name of the parent run under which every round is tracked.
        folder: of the rounds.
    Returns:
        How many rounds were made now.
    Raises:
        UserError: a setting is wrong, or does not fit what the folder holds.
        Failure: as drawing, scoring, training and tracking do.
    """
    from workbench.tracking import connect
    from workbench.tracking.artifacts import check_artifacts

    writable_folder("--output", folder)
    theirs = [path.name for path in folder.iterdir() if not (path.name == "drawn" or path.name.isdigit())]
    if theirs:
        raise UserError(f"--output {folder}: has {theirs[0]} in it, which no rounds have written; choose a new folder")
    with ExitStack() as stack:
        if not stack.enter_context(locks.try_lock(paths.state_path("runs", f"{study}-rounds"))):
            raise UserError(f"--study {study}: its rounds are being made by another command")
        every = [Round(number, folder, config) for number in range(1, config.rounds.count + 1)]
        # All before any: a model that has vanished is found before hours of drawing with another.
        left = [one for one in every if not one.is_whole()]
        if left and any(later not in left for later in every[left[0].number :]):
            raise UserError(
                f"{left[0].place}: this round is missing, and later ones were made from it; bring it back, or remove "
                "those too"
            )
        if left:
            check_artifacts(connect())  # before hours of drawing that could not be tracked
        for one in left:
            _make(one, study)
    return len(left)


def _make(one: Round, study: str) -> None:
    """Draw, score and pair, then train."""
    click.echo(f"Round {one.number} of {one.declared.rounds.count}")
    try:
        preferences.complete(preferences.prepare(_request(one)))
    except (UserError, Failure) as error:
        raise type(error)(f"round {one.number}: {error}") from None
    config, label = one.config, f"{study}-round-{one.number}"
    prepared = prepare(config)
    check(config, prepared)
    snapshots = Snapshots(paths.state_path("runs", label), config.snapshots.interval, config.snapshots.keep)
    with partial_file(one.model) as fresh, stop_on_signals("SIGINT", "SIGTERM", "SIGHUP", patience=PATIENCE) as asked:
        again, kept = "the same command", partial(_keep, one, fresh)
        run = SingleRun(config, prepared, label, snapshots, asked, fresh, False, again, kept, shown_as=one.model)
        tracked(run, study, "rounds of draw, score, pair and train.", round_settings(config))


def _keep(one: Round, fresh: Path) -> None:
    """Put a round's model in its place, and write down that the round is whole."""
    replace_folder(fresh, one.model)
    with in_place(one.place / "round.json") as partial_name:
        partial_name.write_text(json.dumps(one.settings, indent=1) + "\n", encoding="utf-8")


def _request(one: Round) -> preferences.Request:
    """What is drawn in a round: by the policy of the round before, or by the pretrained model."""
    rounds, model = one.declared.rounds, one.declared.model
    base = f"{model.path}@{model.revision}" if model.revision else model.path
    source = str(one.before.model) if one.before else base
    return preferences.Request(
        models=(f"round {one.number - 1}={source}",),
        base=base,
        variant=model.variant,
        prompts=(f"train={rounds.prompts}",),
        limit=rounds.limit,
        scorers=rounds.scorers,
        images=rounds.images,
        every=rounds.settings == "all",
        steps=rounds.steps,
        guidance=rounds.guidance,
        rule=Rule(rounds.pairs, rounds.label, rounds.gap, rounds.tie, rounds.slope),
        # Every round has noise of its own.
        seed=1000 * one.declared.seed + one.number,
        resolution=model.resolution,
        dtype=model.dtype,
        device=model.device,
        batch_size=rounds.batch_size,
        image_format=rounds.image_format,
        sheet=24,
        out=one.pairs,
        work=one.folder / "drawn",
    )
