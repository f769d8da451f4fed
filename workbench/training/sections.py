"""What a table of settings is, and the table of a study; `config` has the others and puts them together."""

import os
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from workbench.common.errors import shown
from workbench.common.validation import LARGEST, RUN_NAME, NotNegative, is_place

#: Keys by which a table of a search space is a dimension, and not one of settings.
DIMENSION = {"type", "choices", "low", "high", "log", "step"}
Direction: TypeAlias = Literal["maximize", "minimize"]


class Section(BaseModel):
    """A table of settings: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, table: Any) -> Any:
        """Refuse true and false where a number is expected: pydantic would take them for 1 and 0."""
        numbers = {name for name, field in cls.model_fields.items() if field.annotation in (int, float)}
        wrong = [key for key in numbers if isinstance(table, dict) and isinstance(table.get(key), bool)]
        error = PydanticCustomError("number", "expected a number")
        if wrong:
            raise ValidationError.from_exception_data(
                cls.__name__, [{"type": error, "loc": (key,), "input": table[key]} for key in wrong]
            )
        return table

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Refuse whole numbers beyond LARGEST, which is also the largest seed that numpy takes."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) > LARGEST:
                raise ValueError(f"expected at most {LARGEST}")
        return value


class Pruning(Section):
    """When a trial counts as collapsed and is stopped."""

    metric: str = Field("divergence/policy", description="metric watched at every diagnostics pass")
    above: float = Field(0.3, description="stop the trial when the metric exceeds this")


class Tuning(Section):
    """A small search that every arm makes for itself before it is compared."""

    factors: dict[str, Annotated[list[float], Field(min_length=1)]] = Field(
        {}, description="setting -> factors of an arm's own value to try"
    )
    arms: tuple[str, ...] = Field((), description="arms that are tuned; none named = all without `like`")
    design: Literal["grid", "star"] = Field(
        "grid", description="all combinations of factors, or one setting at a time with the others as they are"
    )
    extensions: NotNegative = Field(
        0, description="times that the search goes on beyond its edge, for arms whose best value lies there"
    )
    settings: dict[str, Any] = Field({}, description="settings of the search's runs alone")


def _texts(value: Any) -> Any:
    """Check that there is a text or a list of some; a list of one is that one, so that a study has one spelling."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text or a list of texts")
    return texts[0] if len(texts) == 1 else tuple(texts)


def _place(text: str) -> str:
    if not is_place(text):
        raise ValueError("no file or folder has such a name")
    return os.path.expanduser(text)


def _run_name(text: str) -> str:
    if not RUN_NAME.fullmatch(text):
        raise ValueError("use letters, digits, blanks and . , : = + - _, at most 200, starting with a letter or digit")
    return text


def _arm(declared: dict[str, Any]) -> dict[str, Any]:
    """Check the keys of an arm that are not settings."""
    for key, kind, wanted in (("like", str, "the name of an arm"), ("times", dict, "a table")):
        if not isinstance(declared.get(key, kind()), kind):
            raise ValueError(f"{key} = {shown(declared[key])}: expected {wanted}")
    return declared


def _dimension(declared: dict[str, Any]) -> dict[str, Any]:
    """Check the choices of a dimension, which a database has to keep."""
    choices = declared.get("choices", [""])
    if not isinstance(choices, list | tuple) or not all(isinstance(x, str | int | float) for x in choices):
        raise ValueError("choices: expected a list of texts, numbers and truth values")
    return declared


def _dimensions(tree: Any, prefix: str = "") -> Any:
    """A search space by dotted names, whether its keys are quoted or lie in tables; a plain list is its choices.

    Without quotes `reference.interval = [4, 8]` is a table `reference` to TOML.
    """
    if not isinstance(tree, dict):
        return tree
    space: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple):
            found = {name: {"type": "CategoricalDistribution", "choices": list(value)}}
        elif isinstance(value, dict) and value and not set(value) & DIMENSION:
            found = _dimensions(value, f"{name}.")
        else:
            found = {name: value}
        if twice := space.keys() & found.keys():
            raise ValueError(f"{min(twice)} is there twice")
        space |= found
    return space


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is there twice")
    return seeds


Place = Annotated[str, AfterValidator(_place)]
#: A folder of weights, or nothing.
StartPlace = Annotated[str, AfterValidator(lambda text: _place(text) if text else text)]
RunName = Annotated[str, AfterValidator(_run_name)]
Arm = Annotated[dict[str, Any], AfterValidator(_arm)]
Dimension = Annotated[dict[str, Any], AfterValidator(_dimension)]
Seeds = Annotated[tuple[NotNegative, ...], AfterValidator(_distinct)]
#: One text, or several.
Texts = Annotated[str | tuple[str, ...], BeforeValidator(_texts)]


class Sweep(Section):
    """The study."""

    trials: NotNegative = Field(10, description="finished trials in all; 0 = the arms alone")
    objective: Texts = Field("eval/win_rate", description="final metric that the study optimises, or a list of several")
    direction: Texts = Field(
        "maximize", validate_default=True, description="or minimize; a list for several objectives"
    )
    constraints: dict[str, float] = Field({}, description="final metric -> largest value that a trial may end with")
    sampler: str = Field("TPESampler", description="a class of optuna.samplers")
    sampler_options: dict[str, Any] = Field({}, description="keyword arguments of the sampler")
    seed: NotNegative = Field(0, description="of the sampler")
    pruner: str = Field("NopPruner", description="a class of optuna.pruners, which stops sampled trials, never arms")
    pruner_options: dict[str, Any] = Field({}, description="keyword arguments of the pruner")
    pruner_metric: str = Field(
        "samples/reward_gain", description="what the pruner sees at every diagnostics pass; the objective's direction"
    )
    prune: Pruning = Field(Pruning(), description="stop a trial as collapsed when `metric` exceeds `above`")
    space: Annotated[dict[str, Dimension], BeforeValidator(_dimensions)] = Field(
        {}, description="setting -> Optuna distribution, or a list of choices"
    )
    arms: dict[RunName, Arm] = Field({}, description="name -> settings of the first trials")
    tuning: Tuning = Field(Tuning(), description="`factors` of settings that each arm tries first; none = no tuning")
    seeds: Seeds = Field((), description="every arm is run once with each; empty = the setting `seed`")

    @property
    def objectives(self) -> dict[str, Direction]:
        """Every metric that the study optimises, with its direction."""
        metrics, directions = (
            (value,) if isinstance(value, str) else value for value in (self.objective, self.direction)
        )
        return dict(zip(metrics, directions, strict=True))  # type: ignore[arg-type]

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """Every metric that runs have to log for the study, after the key that names it."""
        named = [
            *(("objective", name) for name in self.objectives),
            *(("constraints", name) for name in self.constraints),
        ]
        watched = [("pruner_metric", self.pruner_metric)] if self.prunes else []
        return [*named, *watched, ("prune.metric", self.prune.metric)]

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped that do not keep up with others."""
        return self.pruner != "NopPruner"

    @field_validator("objective")
    @classmethod
    def _each_once(cls, objective: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(objective, tuple) and len(set(objective)) < len(objective):
            raise ValueError("a metric is there twice")
        return objective

    @field_validator("direction")
    @classmethod
    def _one_each(cls, direction: str | tuple[str, ...], info: ValidationInfo) -> str | tuple[str, ...]:
        directions = (direction,) if isinstance(direction, str) else direction
        if not set(directions) <= {"maximize", "minimize"}:
            raise ValueError("expected maximize or minimize")
        objective = info.data.get("objective", "")  # not there where it is wrong itself
        count = 1 if isinstance(objective, str) else len(objective)
        if objective and len(directions) != count:
            raise ValueError(f"{count} {'objectives need' if count > 1 else 'objective needs'} as many directions")
        return direction
