"""An experiment, resolved and checked once, as it is handed to workers, attempts, tuning and results.

Settings are resolved when a command starts. Below, nobody reads dotted settings again: a trial's configuration comes
from `Experiment.trial_config`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna import Trial
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from workbench.common.errors import UserError
from workbench.studies.records import TrialRecord
from workbench.studies.space import Dimension, arm_point, read_pruner, read_sampler, read_space
from workbench.training.config import Config, merge, resolve
from workbench.training.sections import Sweep
from workbench.training.snapshots import is_definite

Settings = Mapping[str, Any]  # by dotted name; the sweep's keys are "sweep.KEY", with tables as values
Tuned = Mapping[str, Mapping[str, float]]  # arm -> setting -> the value that tuning chose


@dataclass(frozen=True)
class Arm:
    """An arm with one training seed. Each is one of the study's first trials.

    Attributes:
        name: the arm's.
        label: its name, with the seed where the study has several.
        overrides: dotted settings on top of the experiment's, the seed included.
        config: the experiment's configuration with them on top.
        point: where in the search space it lies.
    """

    name: str
    label: str
    overrides: Settings
    config: Config
    point: Settings


@dataclass(frozen=True)
class Experiment:
    """Everything that an experiment declares. Made by `Experiment.resolve`.

    Attributes:
        declared: dotted settings as given, before tuning.
        declared_sweep: their sweep, with its tuning and with arms that still have `like` and `times`.
        tuned: the values that tuning chose for the arms.
        settings: dotted settings in which each arm has its final values; a study keeps them, to be resumed by.
        config: `settings`, resolved; trials differ from it in their arm's or the sampler's settings.
        space: what the sampler chooses.
        arms: the arms with every seed.
    """

    declared: Settings
    declared_sweep: Sweep
    tuned: Tuned
    settings: Settings
    config: Config
    space: tuple[Dimension, ...]
    arms: tuple[Arm, ...]

    @classmethod
    def resolve(cls, declared: Settings, tuned: Tuned | None = None) -> "Experiment":
        """Resolve and check an experiment's settings.

        Args:
            declared: dotted settings, the sweep's included.
            tuned: what tuning chose for the arms; arms that are not in it keep their own values.
        Raises:
            UserError: an unknown key, a value that is not accepted, or parts that do not go together.
        """
        declared, tuned, sweep = dict(declared), dict(tuned or {}), resolve(declared).sweep
        arms = _final_arms(sweep, declared, tuned)
        settings = without(declared, "sweep.tuning", "sweep.arms") | {"sweep.arms": arms}
        config = resolve(settings)
        space = tuple(read_space(config))
        # Made to be checked, before anything runs, and thrown away: each worker makes its own.
        read_sampler(config.sweep, space)
        read_pruner(config.sweep)
        return cls(declared, sweep, tuned, settings, config, space, tuple(_with_seeds(config, settings, space)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Some classes of a Config are made at run time and cannot be pickled. A worker process resolves the settings
        # again, which gives the same.
        return Experiment.resolve, (self.declared, self.tuned)

    @property
    def sweep(self) -> Sweep:
        """What the study optimises, and how."""
        return self.config.sweep

    @property
    def trials(self) -> int:
        """How many finished trials the study is to have in all; with `sweep.trials = 0` the arms alone."""
        return self.sweep.trials or len(self.arms)

    def changed(self, layer: Settings) -> "Experiment":
        """The same experiment with other settings on top."""
        return Experiment.resolve(merge(dict(self.declared), layer), self.tuned)

    def run_config(self, layer: Settings) -> Config:
        """The configuration of a run that is no trial: the experiment's with other settings on top, without a sweep."""
        return resolve(without(merge(dict(self.declared), layer), "sweep"))

    def sampler(self, offset: int) -> BaseSampler:
        """The declared sampler, its seed plus an offset."""
        return read_sampler(self.sweep, self.space, offset)

    def pruner(self) -> BasePruner:
        """The declared pruner."""
        return read_pruner(self.sweep)

    def trial_config(self, trial: Trial | FrozenTrial) -> Config:
        """The configuration of a trial: the experiment's with the arm's settings, or the sampler's, on top."""
        overrides = TrialRecord.of(trial).overrides
        settings = dict(self.settings)
        if overrides is not None:
            config = resolve(merge(settings, overrides))
            point = arm_point(config.flat(), self.space)
            for dimension in self.space:
                # Without a coordinate, `suggest` would let the sampler choose a value that the arm does not have.
                if dimension.name in point:
                    dimension.suggest(trial)  # returns the arm's own value; the sampler learns from it
            return config
        # In the order declared: what one dimension chooses decides whether the setting of a later one exists.
        for dimension in self.space:
            if dimension.name in resolve(settings).flat():
                settings = merge(settings, {dimension.name: dimension.suggest(trial)})
        return resolve(settings)

    def settings_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """The dotted settings with which a trial was run, resolved: its arm's, or what the sampler chose."""
        overrides = TrialRecord.of(trial).overrides
        return resolve(merge(dict(self.settings), trial.params if overrides is None else overrides)).flat()

    def definition(self) -> dict[str, Any]:
        """What makes a study what it is, as JSON has it. How long, and how safely, it runs may be changed later."""
        sweep = self.sweep.model_dump(include={"space", "arms", "seeds", "objective", "direction", "constraints"})
        if not sweep["constraints"]:
            del sweep["constraints"]  # studies made before there were constraints lack the key
        settings = {key: value for key, value in self.config.flat().items() if is_definite(key)}
        # Through JSON, as it comes back from the database: tuples would differ from the lists that they become there.
        return json.loads(json.dumps(settings | {f"sweep.{key}": value for key, value in sweep.items()}))


def without(settings: Settings, *tables: str) -> dict[str, Any]:
    """Dotted settings without some tables and everything in them."""
    inside = tuple(f"{table}." for table in tables)
    return {name: value for name, value in settings.items() if name not in tables and not name.startswith(inside)}


def own_settings(arm: Settings) -> dict[str, Any]:
    """The settings among what an arm declares: all but `like` and `times`."""
    return {key: value for key, value in arm.items() if key not in ("like", "times")}


def arm_config(name: str, base: Settings, overrides: Settings) -> Config:
    """The configuration of an arm.

    Raises:
        UserError: a setting is not accepted; the message names the arm.
    """
    try:
        return resolve(merge(dict(base), overrides))
    except UserError as error:
        raise UserError(f"sweep.arms.{name}: {error}") from None


def times(name: str, value: Any, factor: Any) -> float:
    """A setting's value times a factor, to three digits; a whole number stays one where the product is.

    Raises:
        UserError: one of them is not a number.
    """
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (value, factor)):
        raise UserError(f"{name} = {value!r} times {factor!r}: both must be numbers")
    # Unrounded, 0.1 * 3 is 0.30000000000000004 in labels, tables and the study's definition.
    product = float(f"{value * factor:.3g}")
    return int(product) if isinstance(value, int) and product.is_integer() else product


def _final_arms(sweep: Sweep, declared: Settings, tuned: Tuned) -> dict[str, dict[str, Any]]:
    """The settings of every arm: its own, then what was tuned for it or for the arm it is `like`, then `times`.

    Raises:
        UserError: `like` or `times` names something that does not exist.
    """
    arms, final = sweep.arms, {}
    for name, arm in arms.items():
        model = arm.get("like", name)
        if model not in arms or (model != name and "like" in arms[model]):
            others = ", ".join(other for other, settings in arms.items() if "like" not in settings)
            raise UserError(f"sweep.arms.{name}.like = {model!r}: expected an arm that is tuned itself: {others}")
        own = own_settings(arm)
        existing = arm_config(name, declared, own).flat()
        # What was tuned for another arm may not exist under the choices of this one.
        own |= {key: value for key, value in tuned.get(model, {}).items() if key in existing}
        # Once more, since `times` multiplies what tuning has chosen.
        existing = arm_config(name, declared, own).flat()
        for key, factor in dict(arm.get("times", {})).items():
            if key not in existing:
                raise UserError(f"sweep.arms.{name}.times.{key}: the arm has no such setting")
            own[key] = times(key, existing[key], factor)
        final[name] = own
    return final


def _with_seeds(config: Config, settings: Settings, space: tuple[Dimension, ...]) -> list[Arm]:
    """Every arm with every seed of the sweep.

    Raises:
        UserError: an arm sets something that belongs to the study.
    """
    seeds, arms = config.sweep.seeds or (config.seed,), []
    for name, own in config.sweep.arms.items():
        foreign = [key for key in own if key.startswith("sweep.") or (key == "seed" and config.sweep.seeds)]
        if foreign:
            raise UserError(f"sweep.arms.{name}: {foreign[0]} cannot be set by an arm here")
        for seed in seeds:
            overrides = {"seed": seed, **own}
            own_config = arm_config(name, settings, overrides)
            label = f"{name}-s{seed}" if len(seeds) > 1 else name
            arms.append(Arm(name, label, overrides, own_config, arm_point(own_config.flat(), space)))
    return arms
