"""An evaluation before it runs: what a command and its output folder ask for, found, checked and written down."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.common.errors import UserError
from workbench.common.validation import is_place, run_name, writable_folder
from workbench.evaluation import prompt_sets, reward_models, sample_store, sources
from workbench.evaluation.prompt_sets import PromptSet
from workbench.evaluation.reward_models import Files
from workbench.evaluation.sample_store import OF_PROMPTS, Record, Shard
from workbench.evaluation.sources import Contender
from workbench.tracking import Client

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")
SAMPLING = ("steps", "guidance", "dtype", "resolution")


@dataclass(frozen=True)
class Job:
    """Everything that a command asks for, checked.

    Attributes:
        record: the output folder's settings.
        contenders: the models that have something left to draw.
        prompts: every prompt set of the folder.
        judges: the files of the scorers that have something left to score.
        ours: the model whose wins are counted.
    """

    output: Path
    device: torch.device
    record: Record
    contenders: Mapping[str, Contender]
    prompts: Mapping[str, PromptSet]
    judges: Mapping[str, Files]
    batch_size: int
    ours: str

    def shards(self) -> list[Shard]:
        """Every shard, by model and prompt set."""
        return _shards(self.output, self.record["models"], self.prompts, self.record["prompts"])


def _shards(
    output: Path, models: Iterable[str], prompts: Mapping[str, PromptSet], known: Mapping[str, Any]
) -> list[Shard]:
    return [
        shard
        for model in models
        for name, one in prompts.items()
        for shard in sample_store.shards(output, model, one, known[name]["seeds"])
    ]


def plan(client: Client, device: torch.device, options: Mapping[str, Any]) -> Job:
    """Find and check everything, and write the settings, before anything is drawn.

    Args:
        options: the command's, by their names.
    Raises:
        UserError, Failure: something is wrong with an option, or does not fit the output folder.
    """
    output, sampling = options["output"], {key: options[key] for key in SAMPLING}
    if not is_place(str(output)):
        raise UserError(f"--output {output}: no folder has such a name")
    if options["name"]:
        run_name("--name", options["name"])
    had = sample_store.recorded(output, sampling)
    prompts, prompts_known = _prompts(had["prompts"], options)
    lacking = _lacking(_shards(output, had["models"], prompts, prompts_known), ["image", *had["scorers"]])
    found = _contenders(client, had["models"], lacking["image"], options)
    models = list(dict.fromkeys([*had["models"], *found]))
    if not models:
        raise UserError("--model: give at least one, for instance --model pretrained=embedded")
    ours = options["ours"] or models[0]
    if ours not in models:
        raise UserError(f"--ours {ours}: not among the models {', '.join(models)}")
    added = set(models) - set(had["models"])
    given = _scorers(had["scorers"], {name for name in had["scorers"] if lacking[name] or added}, options)
    judges = {name: reward_models.locate(name, source) for name, source in given.items()}
    for name in judges:
        for one in prompts.values():
            reward_models.SCORERS[name].check(one.prompts)
    wanted = {
        "sampling": sampling,
        "prompts": prompts_known,
        "models": {name: sources.describe(model, device, sampling) for name, model in found.items()},
        "scorers": {n: {"source": given[n], "digest": reward_models.digest(files)} for n, files in judges.items()},
    }
    record = sample_store.agree(writable_folder("--output", output), had, wanted)
    return Job(output, device, record, found, prompts, judges, options["batch_size"], ours)


def _contenders(
    client: Client, had: Mapping[str, Any], lacking: set[str], options: Mapping[str, Any]
) -> dict[str, Contender]:
    """The command's models, and those of the folder's that lack images."""
    named = _named("--model", sources.expand(client, options["models"]))
    known = {name: (e["source"], e["base"], e["variant"]) for name, e in had.items() if name in lacking}
    known |= {name: (source, options["base"], options["variant"]) for name, source in named.items()}
    return {name: sources.find(client, name, *about) for name, about in known.items()}


def _scorers(had: Mapping[str, Any], needed: set[str], options: Mapping[str, Any]) -> dict[str, str]:
    """The command's scorers, and those of the folder's that have something to do, with where they come from."""
    known = {name: e["source"] for name, e in had.items()}
    texts = [text if "=" in text else f"{text}={known.get(text, '')}" for text in options["scorers"]]
    asked = _named("--scorer", texts) or ({} if had else {"reward": ""})
    return {name: source for name, source in known.items() if name in needed} | asked


def _named(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=SOURCE options as a dictionary."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals:
            raise UserError(f"{option} {text}: expected NAME=SOURCE")
        if not NAME.fullmatch(name):
            raise UserError(f"{option} {text}: a name has letters, digits, '.', '_', '-' and blanks, not {name!r}")
        if name in named:
            raise UserError(f"{option} {text}: {name!r} is there twice; give another name")
        named[name] = source
    return named


def _prompts(had: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, PromptSet], dict[str, Any]]:
    """All prompt sets, the folder's and the command's, and what the settings say of them."""
    texts = [text if "=" in text else f"{Path(text).stem}={text}" for text in options["sources"]]
    asked = _named("--prompts", texts) or ({} if had else {"embedded": "embedded"})
    about = {name: {key: e[key] for key in ("source", *OF_PROMPTS)} for name, e in had.items()}
    about |= {name: {"source": source} | {key: options[key] for key in OF_PROMPTS} for name, source in asked.items()}
    for name, key in ((name, key) for name in had for key in OF_PROMPTS):
        old, new = had[name][key], about[name][key]
        if old != new:
            raise UserError(f"--output {options['output']}: prompts {name!r} have --{key} {old} there, not {new}")
    found = {name: prompt_sets.read(e["source"], name).head(e["limit"]) for name, e in about.items()}
    return found, {name: about[name] | {"count": len(one.prompts), "digest": one.digest} for name, one in found.items()}


def _lacking(shards: Iterable[Shard], columns: Sequence[str]) -> dict[str, set[str]]:
    """Column -> the models that have a shard without it."""
    lacking: dict[str, set[str]] = {column: set() for column in columns}
    for shard in shards:
        for column in set(columns) - sample_store.columns(shard.path):
            lacking[column].add(shard.model)
    return lacking
