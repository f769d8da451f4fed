"""What a study searches and for what, as Optuna's objects: space, sampler, pruner, objectives and constraints."""

import math
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from optuna import Trial, create_study, distributions, logging, pruners, samplers
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial

from workbench.common.errors import UserError
from workbench.training.config import CHOICES, Config, known_names, resolve
from workbench.training.sections import Sweep

# As `storage` does: a worker uses this module first, and each study that only checks a sampler would be a line.
logging.set_verbosity(logging.ERROR)

DISTRIBUTIONS = ("CategoricalDistribution", "IntDistribution", "FloatDistribution")


class Dimension(NamedTuple):
    """A setting that the sampler chooses, in trials whose other choices let the setting exist."""

    name: str
    distribution: distributions.BaseDistribution

    def suggest(self, trial: Trial | FrozenTrial) -> Any:
        """The value of this setting in a trial: chosen now, or for a `FrozenTrial` the one that it had."""
        d = self.distribution
        if isinstance(d, distributions.CategoricalDistribution):
            return trial.suggest_categorical(self.name, d.choices)
        if isinstance(d, distributions.IntDistribution):
            return trial.suggest_int(self.name, d.low, d.high, step=d.step, log=d.log)
        assert isinstance(d, distributions.FloatDistribution)
        return trial.suggest_float(self.name, d.low, d.high, step=d.step, log=d.log)

    def contains(self, value: Any) -> bool:
        """Whether the distribution could give this value."""
        d = self.distribution
        if isinstance(d, distributions.CategoricalDistribution):
            return value in d.choices
        assert isinstance(d, distributions.IntDistribution | distributions.FloatDistribution)
        return d.low <= value <= d.high


def read_space(config: Config) -> list[Dimension]:
    """The declared search space, in order.

    Raises:
        UserError: an unknown setting, distribution or argument, a value that the setting does not accept, or a
            dimension that takes part under no choice.
    """
    known, chosen, space = known_names(), config.flat(), []
    selectors = [f"{section}.{selector}" for section, (selector, _, _) in CHOICES.items()]
    choices = {selector: {chosen[selector]} for selector in selectors}  # grows by what earlier dimensions may choose
    for name, declared in config.sweep.space.items():
        key = f"sweep.space.{name}"
        if name not in known or name.startswith("sweep."):
            raise UserError(f"{key}: no setting of that name")
        distribution = _distribution(key, declared)
        values = declared.get("choices", [declared.get("low"), declared.get("high")])
        if name in choices:
            choices[name] |= set(values)
        host = _host(key, name, choices)
        for value in values:
            try:
                # Soft labels are refused where nothing says which scores the data have.
                resolve({"data.scores": config.data.scores, **host, name: value})
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
        space.append(Dimension(name, distribution))
    return space


def _distribution(key: str, declared: Mapping[str, Any]) -> distributions.BaseDistribution:
    """The distribution of a dimension.

    Raises:
        UserError: Optuna has none of that name, or it does not accept these arguments.
    """
    arguments = dict(declared)
    kind = arguments.pop("type", None)
    if kind not in DISTRIBUTIONS:
        raise UserError(f"{key}.type = {kind!r}: expected one of {', '.join(DISTRIBUTIONS)}")
    try:
        return getattr(distributions, kind)(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from None


def _host(key: str, name: str, choices: Mapping[str, set]) -> dict[str, Any]:
    """A choice under which a setting exists; empty for settings that always exist.

    Args:
        choices: selecting setting -> what it may be in this study.
    Raises:
        UserError: the setting exists under none of the choices.
    """
    section = name.split(".")[0]
    selector = f"{section}.{CHOICES[section][0]}" if section in CHOICES else ""
    if name == selector or not selector:
        return {}
    for choice in sorted(choices[selector]):
        if name in resolve({selector: choice}).flat():
            return {selector: choice}
    raise UserError(
        f"{key}: {selector} = {', '.join(sorted(choices[selector]))} does not take it; choose another, or put "
        f"{selector} with more choices above it in sweep.space"
    )


def _class_of(module: ModuleType, base: Any, key: str, name: str, examples: str) -> Any:
    """One of Optuna's classes by its name.

    Raises:
        UserError: the module has no such class.
    """
    named = getattr(module, name, None)
    if not (isinstance(named, type) and issubclass(named, base)):
        raise UserError(f"{key} = {name!r}: no such class in {module.__name__} (e.g. {examples})")
    return named


def read_sampler(sweep: Sweep, space: Sequence[Dimension], offset: int = 0) -> samplers.BaseSampler:
    """The declared sampler.

    Args:
        offset: added to its seed, so that workers and resumed sessions do not draw the same trials.
    Raises:
        UserError: no such sampler, or it does not support these options, this space or several objectives.
    """
    name, options = sweep.sampler, dict(sweep.sampler_options)
    sampler_class = _class_of(samplers, samplers.BaseSampler, "sweep.sampler", name, "TPESampler, RandomSampler")
    if name == "TPESampler":
        # Running trials count as bad guesses, so that workers do not try the same point; dimensions that only some
        # trials have are sampled jointly with those that go with them.
        options = {"multivariate": True, "group": True, "constant_liar": True, "n_startup_trials": 4} | options
    seed = (sweep.seed + offset) % 2**32  # numpy accepts no larger one
    try:
        with warnings.catch_warnings():  # a worker makes its sampler before it has silenced anything
            warnings.simplefilter("ignore", ExperimentalWarning)
            # Two alike: the trial below draws from one, so that the other is returned with its random numbers unused.
            tried, sampler = (sampler_class(**options, seed=seed) for _ in range(2))
    except Exception as error:  # each sampler checks its options in its own way
        raise UserError(f"sweep.sampler_options = {options}: {error}") from None
    try:  # one trial of a study in memory, since some samplers check space and objectives only then
        study = create_study(directions=[*sweep.objectives.values()], sampler=tried)
        study.ask({dimension.name: dimension.distribution for dimension in space})
    except Exception as error:
        chosen = f"{name!r} with {options}" if options else repr(name)
        raise UserError(f"sweep.sampler = {chosen}: {error}") from None
    return sampler


def read_pruner(sweep: Sweep) -> pruners.BasePruner:
    """The declared pruner.

    Raises:
        UserError: no such pruner, it does not support these options, or there are several objectives.
    """
    name, options = sweep.pruner, dict(sweep.pruner_options)
    if not sweep.prunes:  # options of a pruner that was switched off are not looked at
        return pruners.NopPruner()
    pruner_class = _class_of(pruners, pruners.BasePruner, "sweep.pruner", name, "PercentilePruner")
    if len(sweep.objectives) > 1:
        raise UserError(f"sweep.pruner = {name!r}: Optuna prunes for one objective alone; leave it at 'NopPruner'")
    try:
        return pruner_class(**options)
    except Exception as error:  # each pruner checks its options in its own way
        raise UserError(f"sweep.pruner_options = {options}: {error}") from None


def arm_point(settings: Mapping[str, Any], space: Sequence[Dimension]) -> dict[str, Any]:
    """Where in the space a set of resolved settings lies; settings outside of their dimension are left out."""
    return {d.name: settings[d.name] for d in space if d.name in settings and d.contains(settings[d.name])}


def constrain(trial: Trial, sweep: Sweep, measured: Mapping[str, float]) -> None:
    """Store by how much a trial exceeds each bound; 0 or less is within.

    Pruned trials need this too: Optuna takes a trial without constraints for one that satisfies them all.

    Args:
        measured: metrics; one that is missing or not finite exceeds its bound by infinity.
    """
    for metric, bound in sweep.constraints.items():
        # Optuna refuses NaN as a constraint; infinity is beyond every bound.
        excess = measured.get(metric, math.inf) - bound
        trial.set_constraint(metric, excess if math.isfinite(excess) else math.inf)


def outcome(trial: Trial, sweep: Sweep, final: Mapping[str, float]) -> float | tuple[float, ...]:
    """The values of a trial's objectives, as Optuna expects them; its constraints are stored too.

    Args:
        final: every metric's last value.
    Raises:
        FloatingPointError: an objective or a constrained metric is not finite.
    """
    # Optuna would only mark such a trial as failed, and failed trials without a reason are tried again.
    for metric in (*sweep.objectives, *sweep.constraints):
        value = final.get(metric, math.nan)  # a metric of a timestep bucket in which no pair lay
        if not math.isfinite(value):
            raise FloatingPointError(f"{metric} = {value} at the end: not finite")
    constrain(trial, sweep, final)
    values = tuple(final[metric] for metric in sweep.objectives)
    return values if len(values) > 1 else values[0]
