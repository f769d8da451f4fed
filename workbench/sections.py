"""What a table of settings is, and the table of a study; `config` has the others and puts them together."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Direction: TypeAlias = Literal["maximize", "minimize"]


class Section(BaseModel):
    """A table of settings: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pruning(Section):
    """When a trial counts as collapsed and is stopped."""

    metric: str = Field("divergence/policy", description="metric watched at every diagnostics pass")
    above: float = Field(0.3, description="stop the trial when the metric exceeds this")


class Tuning(Section):
    """A small search that every arm makes for itself before it is compared."""

    factors: dict[str, list[float]] = Field({}, description="setting -> factors of an arm's own value to try")
    settings: dict[str, Any] = Field({}, description="settings of the search's runs alone")


def _texts(value: Any) -> Any:
    """Check that there is a text or a list of some; a list of one is that one, so that a study has one spelling."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text or a list of texts")
    return texts[0] if len(texts) == 1 else tuple(texts)


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
    prune: Pruning = Field(Pruning(), description="stop a trial as collapsed when `metric` exceeds `above`")
    space: dict[str, dict[str, Any]] = Field({}, description="setting -> Optuna distribution")
    arms: dict[str, dict[str, Any]] = Field({}, description="name -> settings of the first trials")
    tuning: Tuning = Field(Tuning(), description="`factors` of settings that each arm tries first; none = no tuning")
    seeds: tuple[NotNegative, ...] = Field((), description="every arm is run once with each; empty = the seed above")

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
        return [*named, ("prune.metric", self.prune.metric)]

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
