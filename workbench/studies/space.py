"""What a study searches and for what: space, sampler, arms, objectives and constraints as an experiment declares them.

Knows Optuna's vocabulary.
"""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from optuna import Trial, create_study, distributions, pruners, samplers

from workbench.common.errors import UserError
from workbench.training.config import CHOICES, Config, known_names, merge, resolve
from workbench.training.sections import Sweep

DISTRIBUTIONS = ("CategoricalDistribution", "IntDistribution", "FloatDistribution")


class Dimension(NamedTuple):
    """A setting that the sampler chooses; it takes part where the setting exists under the other choices made."""

    name: str
    distribution: distributions.BaseDistribution

    def suggest(self, trial: Trial) -> Any:
        """The trial's value."""
        d = self.distribution
        if isinstance(d, distributions.CategoricalDistribution):
            return trial.suggest_categorical(self.name, d.choices)
        if isinstance(d, distributions.IntDistribution):
            return trial.suggest_int(self.name, d.low, d.high, step=d.step, log=d.log)
        assert isinstance(d, distributions.FloatDistribution)
        return trial.suggest_float(self.name, d.low, d.high, step=d.step, log=d.log)

    def holds(self, value: Any) -> bool:
        """Whether the distribution could give this value."""
        d = self.distribution
        if isinstance(d, distributions.CategoricalDistribution):
            return value in d.choices
        assert isinstance(d, distributions.IntDistribution | distributions.FloatDistribution)
        return d.low <= value <= d.high


def read_space(config: Config) -> list[Dimension]:
    """The declared search space, in order.

    Raises:
        UserError: an unknown setting, distribution or argument, a value that the setting does not take, or a
            dimension that no choice lets apply.
    """
    known, chosen, space = known_names(), config.flat(), []
    choices = {
        f"{section}.{selector}": {chosen[f"{section}.{selector}"]} for section, (selector, _, _) in CHOICES.items()
    }
    for name, declared in config.sweep.space.items():
        key = f"sweep.space.{name}"
        if name not in known or name.startswith("sweep."):
            raise UserError(f"{key}: no setting of that name")
        arguments = dict(declared)
        kind = arguments.pop("type", None)
        if kind not in DISTRIBUTIONS:
            raise UserError(f"{key}.type = {kind!r}: expected one of {', '.join(DISTRIBUTIONS)}")
        try:
            distribution = getattr(distributions, kind)(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"{key}: {error}") from None
        values = declared.get("choices", [declared.get("low"), declared.get("high")])
        section = name.split(".")[0]
        selector = f"{section}.{CHOICES[section][0]}" if section in CHOICES else ""
        hosts = [{selector: choice} for choice in sorted(choices[selector])] if selector else [{}]
        if name == selector:
            hosts, choices[selector] = [{}], choices[selector] | set(values)
        hosts = [host for host in hosts if name in resolve(host).flat()]
        if not hosts:
            raise UserError(
                f"{key}: {selector} = {', '.join(sorted(choices[selector]))} does not take it; choose another, or put "
                f"{selector} with more choices above it in sweep.space"
            )
        for value in values:
            try:
                resolve({**hosts[0], name: value})
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
        space.append(Dimension(name, distribution))
    return space


def _class_of(room: ModuleType, base: Any, key: str, name: str, examples: str) -> Any:
    """One of Optuna's classes by its name."""
    found = getattr(room, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key} = {name!r}: no such class in {room.__name__} (e.g. {examples})")
    return found


def read_sampler(config: Config, offset: int = 0) -> samplers.BaseSampler:
    """The declared sampler; the offset to its seed keeps workers and resumed sessions from drawing alike.

    Raises:
        UserError: no such sampler, or it does not take these options, this space or several objectives.
    """
    name, options = config.sweep.sampler, dict(config.sweep.sampler_options)
    found = _class_of(samplers, samplers.BaseSampler, "sweep.sampler", name, "TPESampler, RandomSampler")
    if name == "TPESampler":  # running trials count as bad guesses; dimensions that exist together go together
        options = {"multivariate": True, "group": True, "constant_liar": True, "n_startup_trials": 4} | options
    seed = (config.sweep.seed + offset) % 2**32  # numpy takes no larger one
    try:
        tried, sampler = (found(**options, seed=seed) for _ in range(2))  # type: ignore[call-arg]
    except Exception as error:  # each sampler looks at its options in its own way
        raise UserError(f"sweep.sampler_options = {options}: {error}") from None
    try:
        study = create_study(directions=[*config.sweep.objectives.values()], sampler=tried)
        study.ask({dimension.name: dimension.distribution for dimension in read_space(config)})
    except UserError:
        raise
    except Exception as error:  # or at the first trial
        chosen = f"{name!r} with {options}" if options else repr(name)
        raise UserError(f"sweep.sampler = {chosen}: {error}") from None
    return sampler


def read_pruner(config: Config) -> pruners.BasePruner:
    """The declared pruner.

    Raises:
        UserError: no such pruner, it does not take these options, or there are several objectives.
    """
    name, options = config.sweep.pruner, dict(config.sweep.pruner_options)
    if not config.sweep.prunes:  # whatever the options of the one that was switched off
        return pruners.NopPruner()
    found = _class_of(pruners, pruners.BasePruner, "sweep.pruner", name, "PercentilePruner")
    if len(config.sweep.objectives) > 1:
        raise UserError(f"sweep.pruner = {name!r}: Optuna prunes for one objective alone; leave it at 'NopPruner'")
    try:
        return found(**options)
    except Exception as error:  # each pruner looks at its options in its own way
        raise UserError(f"sweep.pruner_options = {options}: {error}") from None


def arm_point(settings: Mapping[str, Any], space: list[Dimension]) -> dict[str, Any]:
    """Where in the space a set of resolved settings lies; what lies outside is left out."""
    return {d.name: settings[d.name] for d in space if d.name in settings and d.holds(settings[d.name])}


def resolve_arm(name: str, base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of an arm: the experiment's with the arm's on top.

    Raises:
        UserError: something impossible; names the arm.
    """
    try:
        return resolve(merge(dict(base), overrides)).flat()
    except UserError as error:
        raise UserError(f"sweep.arms.{name}: {error}") from None


def arms_of(config: Config, base: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every declared arm with every seed: its point in the space, and its attributes."""
    space, queued = read_space(config), []
    seeds = config.sweep.seeds or (config.seed,)
    for name, declared in config.sweep.arms.items():
        foreign = [k for k in declared if k.startswith("sweep.") or (k == "seed" and config.sweep.seeds)]
        if foreign:
            raise UserError(f"sweep.arms.{name}: {foreign[0]} cannot be set by an arm here")
        for seed in seeds:
            overrides = {"seed": seed, **declared}
            label = f"{name}-s{seed}" if len(seeds) > 1 else name
            point = arm_point(resolve_arm(name, base, overrides), space)
            queued.append((point, {"arm": name, "name": label, "overrides": overrides}))
    return queued


def settings_of(trial: Trial, base: Mapping[str, Any], space: list[Dimension]) -> dict[str, Any]:
    """The dotted settings of a trial: the experiment's, then the arm's where it is one, else the sampler's."""
    overrides = trial.user_attrs.get("overrides")
    if overrides is not None:
        settings = merge(dict(base), overrides)
        point = arm_point(resolve(settings).flat(), space)
        for dimension in space:
            if dimension.name in point:  # so that the sampler learns from the arm too
                dimension.suggest(trial)
        return settings
    settings = dict(base)
    for dimension in space:
        if dimension.name in resolve(settings).flat():
            settings = merge(settings, {dimension.name: dimension.suggest(trial)})
    return settings


def constrain(trial: Trial, sweep: Sweep, measured: Mapping[str, float]) -> None:
    """Tell the sampler by how much a trial exceeds each bound; 0 or less is within.

    Trials that are stopped have to be told too: Optuna takes one without constraints for one that keeps them all.

    Args:
        measured: metrics; one that is missing or not finite exceeds its bound by infinity.
    """
    for metric, bound in sweep.constraints.items():
        excess = measured.get(metric, math.inf) - bound
        trial.set_constraint(metric, excess if math.isfinite(excess) else math.inf)


def outcome(trial: Trial, sweep: Sweep, final: Mapping[str, float]) -> float | tuple[float, ...]:
    """What a trial came to, in the form that Optuna takes: a number an objective. Its constraints are told on the way.

    Args:
        final: every metric's last value.
    Raises:
        FloatingPointError: an objective or a constrained metric is not finite.
    """
    for metric in (*sweep.objectives, *sweep.constraints):
        if not math.isfinite(final[metric]):
            raise FloatingPointError(f"{metric} = {final[metric]} at the end: not finite")
    constrain(trial, sweep, final)
    values = tuple(final[metric] for metric in sweep.objectives)
    return values if len(values) > 1 else values[0]
