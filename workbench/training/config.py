"""Experiment settings: one TOML file an experiment, typed, frozen, checked before anything runs.

A setting has one name in five places: `reference.interval` is its path in the TOML file, on the command line,
in Python, in Optuna and in MLflow. Sections that choose a function (`objective`, `timesteps`, `reward_scale`,
`reference`) take that function's keyword arguments as their settings, with its annotations and defaults.
"""

import copy
import difflib
import inspect
import tomllib
from collections.abc import Callable, Mapping
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from workbench.common.errors import UserError, shown
from workbench.common.paths import shipped, shipped_where_missing
from workbench.common.reading import near
from workbench.common.validation import NotNegative, is_place
from workbench.method import modifiers, objectives, reference, reward_scale, timesteps
from workbench.training import plugins
from workbench.training.sections import Section, Sweep
from workbench.training.tables import Data, Diagnostics, Evaluation, Lora, Model, Rounds, SnapshotSection, Train

#: Settings that may name a file or a folder; in an experiment file their paths count from it.
LOCATED = (
    "model.path", "model.vae", "model.policy", "model.reference", "data.train", "data.validation", "data.prompts",
    "rounds.prompts",
)  # fmt: skip
SCORERS = "rounds.scorers"  #: takes functions of the user's own too, as NAME=FUNCTION
DEEPEST = 8  # tables around a value: "sweep.arms.NAME.times.train.lr" has five


def _keywords(function: Callable) -> dict[str, Any]:
    """The keyword-only arguments of a function as pydantic fields."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


#: Section -> (the key that chooses, what it chooses from, what is chosen where nothing is said). Functions of
#: the user's own are put to the others as they are met.
CHOICES: dict[str, tuple[str, dict[str, Callable], str]] = {
    "objective": ("loss", objectives.OBJECTIVES, "dpo"),
    "timesteps": ("density", timesteps.DENSITIES, "uniform"),
    "reward_scale": ("shape", reward_scale.SHAPES, "constant"),
    "reference": ("policy", reference.RULES, "threshold"),
}
#: Section -> the function whose arguments go with every choice of it.
COMMON: dict[str, Callable] = {"objective": modifiers.modified, "reward_scale": reward_scale.scale}


def _choice(section: str) -> Any:
    """The type of a choosing section: its key names a function, its other keys are that function's arguments."""
    selector, table, _ = CHOICES[section]
    members = [
        create_model(  # type: ignore[call-overload]
            f"{selector}:{name}", __base__=Section, **{selector: (Literal[name], name)}, **_settings(section, function)
        )
        for name, function in table.items()
    ]
    # The discriminator: only the chosen function's settings are checked. A plain union would report the errors of all.
    return Annotated[reduce(or_, members), Field(discriminator=selector)]


def _add_plugin(section: str, choice: Any) -> None:
    """Let a section choose a function of the user's own, if that is what it is to choose.

    Raises:
        UserError: it may not be run, or is not there.
    """
    selector, table, _ = CHOICES[section]
    if plugins.is_plugin(choice) and choice not in table:
        table[choice] = plugins.load(choice, f"{section}.{selector}")


def _settings(section: str, function: Callable) -> dict[str, Any]:
    """The settings of a choosing section where it has chosen this function."""
    common = _keywords(COMMON[section]) if section in COMMON else {}
    return _keywords(function) | common


if TYPE_CHECKING:
    # These types are made when the module is run, where mypy cannot follow.
    ObjectiveSection: TypeAlias = Section
    TimestepsSection: TypeAlias = Section
    RewardScaleSection: TypeAlias = Section
    ReferenceSection: TypeAlias = Section
else:
    ObjectiveSection, TimestepsSection = _choice("objective"), _choice("timesteps")
    RewardScaleSection, ReferenceSection = _choice("reward_scale"), _choice("reference")


class Config(Section):
    """An experiment."""

    seed: NotNegative = Field(0, description="of training: data order, timesteps and noise")
    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    train: Train = Train()
    objective: ObjectiveSection
    timesteps: TimestepsSection
    reward_scale: RewardScaleSection
    reference: ReferenceSection
    diagnostics: Diagnostics = Diagnostics()
    evaluation: Evaluation = Evaluation()
    snapshots: SnapshotSection = SnapshotSection()
    sweep: Sweep = Sweep()
    rounds: Rounds = Rounds()

    def chosen(self, section: str) -> tuple[Callable, dict[str, Any]]:
        """The function that a choosing section names, and the keyword arguments it states."""
        selector, table, _ = CHOICES[section]
        settings = getattr(self, section).model_dump()
        function = table[settings.pop(selector)]
        return function, {key: settings[key] for key in _keywords(function)}

    def shared(self, section: str) -> dict[str, Any]:
        """The keyword arguments of a choosing section that go with every choice of it."""
        settings = getattr(self, section).model_dump()
        return {key: settings[key] for key in _keywords(COMMON[section])}

    def flat(self) -> dict[str, Any]:
        """Every resolved setting of a run by its dotted name, defaults included; without those of sweep and rounds."""
        return flatten(self.model_dump(exclude={"sweep", "rounds"}))


def _config_type() -> type[Config]:
    """The type of an experiment, which may choose the functions of the user's own that were met too."""
    own = tuple(tuple(filter(plugins.is_plugin, table)) for _, table, _ in CHOICES.values())
    return _extended_type(own) if any(own) else Config


@cache
def _extended_type(own: tuple[tuple[str, ...], ...]) -> type[Config]:
    sections: Any = {section: (_choice(section), ...) for section in CHOICES}
    return create_model("Config", __base__=Config, **sections)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names.

    Raises:
        UserError: one name is there in two ways, or tables lie deeper than any setting does.
    """
    if prefix.count(".") > DEEPEST:
        raise UserError(f"{prefix}...: nested deeper than any setting is")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        found = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        if twice := flat.keys() & found.keys():
            raise UserError(f"{min(twice)}: is there twice")
        flat |= found
    return flat


def dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, whether they lie in tables or not; the tables of the sweep stay tables.

    Raises:
        UserError: as `flatten` does, or the sweep is no table.
    """
    # Arms and spaces have dotted names as keys: flattened, their own keys could not be told from the path to them.
    sweep = tree.get("sweep", {})
    if not isinstance(sweep, Mapping):
        raise UserError(f"sweep = {shown(sweep)}: expected a table")
    inside = {key: value for key, value in tree.items() if key.startswith("sweep.")}
    outside = {key: value for key, value in tree.items() if key != "sweep" and key not in inside}
    return flatten(outside) | {f"sweep.{key}": value for key, value in sweep.items()} | inside


def merge(base: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the dotted settings of `layer` on top.

    Where the layer chooses another function in a choosing section, the base's arguments that the new function
    does not take are dropped; arguments of the layer itself are kept, so that a misplaced one is an error.
    """
    merged, layer = dict(base), dotted(layer)
    for section, (selector, table, _) in CHOICES.items():
        new = layer.get(f"{section}.{selector}")
        _add_plugin(section, new)
        if new is not None and new != merged.get(f"{section}.{selector}"):
            # For an unknown choice the base's arguments go, so that the error is about the choice and not about them.
            accepted = _settings(section, table[new]) if isinstance(new, str) and new in table else {}
            merged = {k: v for k, v in merged.items() if not k.startswith(f"{section}.") or k.split(".")[1] in accepted}
    return {**merged, **layer}


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, key = name.split(".")
        if len(sections) > DEEPEST:
            raise UserError(f"{name}: nested deeper than any setting is")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UserError(f"{name}: {section} is not a table of settings")
        table[key] = copy.deepcopy(value)  # a later name may lie inside it
    return tree


def _defaults() -> dict[str, Any]:
    return {f"{section}.{selector}": default for section, (selector, _, default) in CHOICES.items()}


def default_config() -> Config:
    """The settings of a run for which nobody has set anything."""
    return Config.model_validate(_tree(_defaults()))


def defaults_beside(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every resolved setting of a run that sets nothing but what is chosen: the same loss, density, shape and policy.

    So `timesteps.gamma` has its default beside a discounted density, and is missing beside a uniform one.

    Args:
        settings: by dotted name; only the choices are looked at. A choice that this version does not know is left out.
    """
    chosen = {}
    for section, (selector, table, _) in CHOICES.items():
        name = settings.get(f"{section}.{selector}")
        if name in table:
            chosen[f"{section}.{selector}"] = name
    return resolve(chosen).flat()


def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that differ from the defaults, its choices among them where they are not the usual ones.

    Args:
        settings: all of a run, resolved, by dotted name; or as text, as a tracking store has them.
    """
    usual = {name: str(value) for name, value in defaults_beside(settings).items()}
    usual |= {name: str(value) for name, value in _defaults().items()}
    return {name: value for name, value in settings.items() if usual.get(name) != str(value)}


def telling(settings: Mapping[str, Any], *also: str) -> dict[str, Any]:
    """The settings that tell a run from others: its choices, its seed, what differs from the defaults, and others.

    Args:
        settings: all of the run, resolved, by dotted name.
        also: names of more settings, such as those in which a study's trials differ.
    """
    chosen = {f"{section}.{selector}" for section, (selector, _, _) in CHOICES.items()}
    told = {"seed", *chosen, *changed(settings), *also}
    return {name: value for name, value in settings.items() if name in told}


def known_names() -> list[str]:
    """Every setting's dotted name, those of all choices included."""
    names = list(flatten(default_config().model_dump()))
    for section, (_, table, _) in CHOICES.items():
        names += [f"{section}.{key}" for function in table.values() for key in _keywords(function)]
    return sorted(set(names))


def _explain(error: ErrorDetails) -> str:
    """One line for a pydantic error: the key, the value, what is accepted."""
    parts = [str(p) for p in error["loc"]]
    if parts[-1:] == ["[key]"]:  # what is wrong is the key itself
        parts = parts[:-2]
    if parts and parts[0] in CHOICES and len(parts) > 1:
        parts = [parts[0], *parts[2:]]  # pydantic names the chosen function between section and key
    name = ".".join(parts) or "''"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known_names(), n=1)
        hint = f"did you mean {close[0]}?" if close and close[0] != name else "see --help for the settings"
        if close and close[0] == name:
            hint = f"not a setting of this {CHOICES[parts[0]][0]}"
        return f"{name}: unknown setting ({hint})"
    if error["type"] == "union_tag_invalid":
        selector, table, _ = CHOICES[parts[0]]
        value = error["input"].get(selector)
        return f"{name}.{selector} = {shown(value)}: expected one of {', '.join(table)}"
    message = error["msg"].removeprefix("Value error, ")  # which pydantic puts before what a check of ours says
    return f"{name} = {shown(error['input'])}: {message[0].lower()}{message[1:]}"


def resolve(flat: Mapping[str, Any]) -> Config:
    """Check dotted settings on top of the defaults.

    Raises:
        UserError: an unknown key or a bad value; the message names key, value and what is accepted.
    """
    try:
        # The default choices lie below: a section that names none still needs one for its discriminator.
        tree = _tree(merge(_defaults(), flat))  # first: it meets functions of the user's own
        config = _config_type().model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors()[:3])) from None
    if config.shared("objective")["label"] == "soft" and not config.data.scores:
        raise UserError(
            "objective.label = 'soft': needs scores of the images; say which by data.scores, e.g. 'reward' for the "
            "columns reward_0 and reward_1"
        )
    return config


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version resolved, with the defaults of those that came later.

    A setting is added so that its default changes nothing. What was stored before stays comparable with what is
    resolved now.

    Args:
        stored: resolved, by dotted name; those of a sweep are left as they are.
    """
    try:
        now = resolve({name: value for name, value in stored.items() if not name.startswith("sweep.")}).flat()
    except UserError:  # one of them is no longer a setting: the comparison will say which
        now = {}
    # What was stored wins: `now` fills in only what it lacks.
    return {**now, **stored}


def read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a TOML file by dotted name; paths in it are relative to it. The sweep stays one table.

    `extends = "OTHER.toml"` puts them on top of another file's, a key of the sweep as a whole: one beside this file, or
    one of the workbench's own, such as "experiments/default.toml".

    Args:
        extended_by: files on top of this one.
    Raises:
        UserError: the file is missing or not TOML, or extends itself.
    """
    if not path.is_file():
        ours = [f"experiments/{each.name}" for each in shipped("experiments").glob("*.toml")]
        raise UserError(f"experiment {path}: no such file{near(path, ours)}")
    if path.resolve() in extended_by:
        raise UserError(f"experiment {path}: extends itself")
    try:
        # utf-8-sig: some editors begin a file with a byte order mark, which TOML does not allow.
        flat = dotted(tomllib.loads(path.read_text("utf-8-sig")))
    except OSError as error:
        raise UserError(f"experiment {path}: cannot be read ({error.strerror})") from None
    # Before ValueError, of which UserError is a kind; so are errors of TOML and of UTF-8.
    except UserError as error:
        raise UserError(f"experiment {path}: {error}") from None
    except RecursionError:
        raise UserError(f"experiment {path}: not valid TOML (nested too deeply)") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number that Python does not read
        raise UserError(f"experiment {path}: not valid TOML ({error})") from None
    for name in LOCATED:
        value = flat.get(name)
        # A name that is nothing beside the file stays as it is: a path from the working folder, or a hub id.
        place, colon, part = value.partition(":") if isinstance(value, str) else ("", "", "")
        if place and place != "embedded" and is_place(place) and (path.parent / place).exists():
            flat[name] = f"{(path.parent / place).resolve()}{colon}{part}"
    flat = _pinning_plugins(flat, path.parent)
    if "extends" not in flat:
        return flat
    base = flat.pop("extends")
    if not isinstance(base, str):
        raise UserError(f"experiment {path}: extends = {shown(base)}: expected the name of another experiment file")
    # The workbench's own files are found from everywhere, as on the command line.
    file = shipped_where_missing(path.parent / base, base)
    return merge(read(file, (*extended_by, path.resolve())), flat)


def _pinning_plugins(flat: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that a user has named, in which functions of the user's own carry their file's digest.

    Args:
        folder: from which paths count.
    Raises:
        UserError: there is no such file.
    """
    selectors = {f"{section}.{selector}" for section, (selector, _, _) in CHOICES.items()}

    def with_digests(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):  # an arm's settings, or a dimension's choices
            return {inner: with_digests(inner if inner in selectors else key, entry) for inner, entry in value.items()}
        if isinstance(value, list):
            return [with_digests(key, entry) for entry in value]
        if key == SCORERS and isinstance(value, str):
            name, _, source = value.rpartition("=")
            own = plugins.OWN.fullmatch(source)
            return f"{name or own['function']}={plugins.pinned(source, folder, key)}" if own else value
        return plugins.pinned(value, folder, key) if key in selectors and plugins.is_plugin(value) else value

    return {key: with_digests(key, value) for key, value in flat.items()}


def parse_override(text: str) -> tuple[str, Any]:
    """A command line's KEY=VALUE; the value is read as TOML, or else is a string.

    Raises:
        UserError: there is no '='.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as reference.interval=16")
    return name, _pinning_plugins({name: _read_value(value)}, Path())[name]


def _read_value(text: str) -> Any:
    """The value in the text of an override."""
    try:
        # Read as one TOML line, so that a value is written as in a file; a bare word is no TOML and is taken as text.
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text  # a second line would be another setting


def load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """An experiment file's settings (or the defaults) with overrides on top, checked."""
    return resolve(merge(read(path) if path else {}, overrides or {}))
