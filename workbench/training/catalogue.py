"""Every setting with its default, what it accepts and what it means, read from the code that checks it.

`python -m workbench.train --settings` prints it, and docs/settings.md holds what that prints.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

from pydantic.fields import FieldInfo

from workbench.common.markdown import markdown_table
from workbench.training.config import CHOICES, COMMON, Config
from workbench.training.sections import Section

WORDS = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "text", "array": "list"}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class Setting(NamedTuple):
    """A row of the catalogue.

    Attributes:
        name: dotted.
        choices: the choices of its section to which it belongs, such as "dpo"; empty where it always applies.
        default: as in TOML.
        accepted: in words.
    """

    name: str
    choices: tuple[str, ...]
    default: str
    accepted: str
    meaning: str


def catalogue() -> list[Setting]:
    """Every setting, in the order of the sections; an argument whose default depends on the choice has several rows."""
    return [row for section in Config.model_fields for row in _section(section)]


def _section(section: str) -> Iterator[Setting]:
    field = Config.model_fields[section]
    if section in CHOICES:
        yield from _choosing(section)
    elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        yield from _plain(section, field.annotation)
    else:
        yield _setting(section, field, Config.model_json_schema()["properties"][section])


def _plain(name: str, section: type[Section]) -> Iterator[Setting]:
    properties = section.model_json_schema()["properties"]
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _plain(f"{name}.{key}", field.annotation)
        else:
            yield _setting(f"{name}.{key}", field, properties[key])


def _choosing(section: str) -> Iterator[Setting]:
    """The setting that chooses, the arguments of its choices, then those that go with every choice."""
    selector, table, default = CHOICES[section]
    yield Setting(f"{section}.{selector}", (), json.dumps(default), _listed(table), f"which {selector}, of those below")
    common = {key: "" for key in inspect.signature(COMMON[section]).parameters} if section in COMMON else {}
    # `_choice` made the union's members in the order of the table, to which functions of the user's own come last.
    members = dict(zip(table, get_args(Config.model_fields[section].annotation), strict=False))
    rows: list[Setting] = []
    for choice, member in members.items():
        properties = member.model_json_schema()["properties"]
        for key, field in member.model_fields.items():
            if key != selector:
                row = _setting(f"{section}.{key}", field, properties[key])
                function = COMMON[section] if key in common else table[choice]
                _add(rows, row._replace(choices=() if key in common else (choice,), meaning=_argument(function, key)))
    yield from sorted(rows, key=lambda row: not row.choices)


def _add(rows: list[Setting], new: Setting) -> None:
    """Put a row to the others; where it says what one of them says, or nothing, that one stands for both."""
    for place, row in enumerate(rows):
        if row[0] == new[0] and row[2:4] == new[2:4] and new.meaning in (row.meaning, ""):
            rows[place] = row._replace(choices=tuple(dict.fromkeys((*row.choices, *new.choices))))
            return
    rows.append(new)


def _setting(name: str, field: FieldInfo, schema: Mapping[str, Any]) -> Setting:
    default = json.dumps(field.get_default(call_default_factory=True))
    return Setting(name, (), default, _accepted(schema), field.description or "")


def _accepted(schema: Mapping[str, Any]) -> str:
    """What pydantic's description of a field lets in, in words."""
    if "enum" in schema:
        return _listed(schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_accepted(one) for one in schema["anyOf"])
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([WORDS.get(schema.get("type", ""), "table"), ", ".join(bounds)]).strip()


def _listed(names: Any) -> str:
    return ", ".join(f"`{json.dumps(name)}`" for name in names)


def _first_line(function: Callable) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0].rstrip(".")


def _argument(function: Callable, name: str) -> str:
    """What a Google-style docstring says of an argument, on one line."""
    found = re.search(rf"^    {name}: (.+(?:\n        .+)*)", inspect.getdoc(function) or "", re.MULTILINE)
    return re.sub(r"\s+", " ", found[1]).rstrip(".") if found else ""


def as_markdown() -> str:
    """The catalogue as Markdown: a heading and a table a section, and what can be chosen in those that choose."""
    parts = []
    for section in Config.model_fields:
        rows = [*_section(section)]
        columns = {
            "setting": [f"`{row.name}`" for row in rows],
            "of": [", ".join(f"`{name}`" for name in row.choices) for row in rows],
            "default": [f"`{row.default}`" for row in rows],
            "accepts": [row.accepted for row in rows],
            "meaning": [row.meaning for row in rows],
        }
        if not any(columns["of"]):
            del columns["of"]
        parts += [f"## {section}", markdown_table([*columns], zip(*columns.values(), strict=True))]
        if section in CHOICES:
            parts.append("\n".join(f"- `{name}`: {_first_line(f)}." for name, f in CHOICES[section][1].items()))
    return "\n\n".join(parts) + "\n"
