"""An evaluation before it runs: what was asked for and what its output folder holds, checked and written down."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.common.distributed import pick_device
from workbench.common.errors import UserError
from workbench.common.validation import is_place, run_name, writable_folder
from workbench.evaluation import model_sources, prompt_sets, reward_models, sample_store, scorers
from workbench.evaluation.model_sources import ModelSource
from workbench.evaluation.prompt_sets import PromptSet
from workbench.evaluation.sample_store import PROMPT_OPTIONS, Settings, Shard
from workbench.evaluation.scorers import Located

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")
SAMPLING = ("steps", "guidance", "dtype", "resolution")


@dataclass(frozen=True)
class Request:
    """The options of `python -m workbench.evaluate`, unchecked; `--help` says what each is.

    Attributes:
        models, prompts, scorers: texts of the form NAME=SOURCE, for some of them SOURCE or NAME alone.
        limit, seeds: of the prompt sets that this request names.
        paper: key of the paper's table of averages, or None.
    """

    models: tuple[str, ...]
    base: str
    prompts: tuple[str, ...]
    limit: int
    scorers: tuple[str, ...]
    seeds: int
    steps: int
    guidance: float
    resolution: int
    batch_size: int
    device: str
    dtype: str
    variant: str
    ours: str
    paper: str | None
    grid: int
    output: Path
    name: str
    images: bool

    @property
    def sampling(self) -> dict[str, Any]:
        """The options that decide how every image of the folder is drawn."""
        return {key: getattr(self, key) for key in SAMPLING}


@dataclass(frozen=True)
class Job:
    """An evaluation, checked and ready to run.

    Attributes:
        settings: what the output folder's settings file says, this request included.
        models: the models that have images left to draw, by name.
        prompts: every prompt set of the folder, by name.
        scorers: those that have images left to score.
        ours: name of the model whose wins are counted.
    """

    output: Path
    device: torch.device
    settings: Settings
    models: Mapping[str, ModelSource]
    prompts: Mapping[str, PromptSet]
    scorers: Sequence[Located]
    batch_size: int
    ours: str

    def shards(self) -> list[Shard]:
        """Every shard of the folder, drawn or not, by model and prompt set."""
        return _shards(self.output, self.settings["models"], self.prompts, self.settings["prompts"])


def _shards(
    output: Path, models: Iterable[str], prompts: Mapping[str, PromptSet], about: Mapping[str, Any]
) -> list[Shard]:
    return [
        shard
        for model in models
        for name, prompt_set in prompts.items()
        for shard in sample_store.shards(output, model, prompt_set, about[name]["seeds"])
    ]


def prepare(request: Request) -> Job:
    """Find and check everything that a request names, and write the folder's settings, before anything is drawn.

    Raises:
        UserError: an option is wrong, or does not fit what the output folder holds.
        Failure: something cannot be fetched.
    """
    output, device = request.output, pick_device(request.device)
    if not is_place(str(output)):
        raise UserError(f"--output {output}: no folder has such a name")
    if request.name:
        run_name("--name", request.name)
    before = sample_store.read_settings(output, request.sampling)
    prompts, about_prompts = _prompts(before["prompts"], request)
    # Of the folder as it is, without this request: what an earlier command left undone is finished too.
    lacking = _lacking(_shards(output, before["models"], prompts, about_prompts), ["image", *before["scorers"]])
    sources = _model_sources(before["models"], lacking["image"], request)
    models = list(dict.fromkeys([*before["models"], *sources]))
    if not models:
        raise UserError("--model: give at least one, for instance --model pretrained=embedded")
    ours = request.ours or models[0]
    if ours not in models:
        raise UserError(f"--ours {ours}: not among the models {', '.join(models)}")
    new_models = set(models) - set(before["models"])
    # A new model needs every score of the folder, so that all models can be compared by each.
    unfinished = {name for name in before["scorers"] if lacking[name] or new_models}
    located = [scorers.locate(*each) for each in _scorers(before["scorers"], unfinished, request).items()]
    for scorer in located:
        for prompt_set in prompts.values():
            scorer.check(prompt_set.prompts)
    # Known models and scorers with work left are described again: `write_settings` refuses them if they have changed.
    wanted = {
        "sampling": request.sampling,
        "prompts": about_prompts,
        "models": {name: model_sources.describe(one, device, request.sampling) for name, one in sources.items()},
        "scorers": {one.name: {"source": one.source, "digest": one.digest} for one in located},
    }
    for name in prompts:
        writable_folder("--output", output / "data" / name)
    # Last: a mistake above leaves the folder as it was.
    settings = sample_store.write_settings(writable_folder("--output", output), before, wanted)
    return Job(output, device, settings, sources, prompts, located, request.batch_size, ours)


def _model_sources(before: Mapping[str, Any], lacking: set[str], request: Request) -> dict[str, ModelSource]:
    """The request's models, and those of the folder's that lack images."""
    sources = sources_by_name("--model", model_sources.expand(request.models))
    about = {name: (e["source"], e["base"], e["variant"]) for name, e in before.items() if name in lacking}
    about |= {name: (source, request.base, request.variant) for name, source in sources.items()}
    return {name: model_sources.find(name, *parts) for name, parts in about.items()}


def _scorers(before: Mapping[str, Any], unfinished: set[str], request: Request) -> dict[str, str]:
    """The request's scorers, and those of the folder's that have images left to score: name -> source."""
    known = {name: e["source"] for name, e in before.items()}
    default = dict.fromkeys(reward_models.PAPER_SCORERS if request.paper else ("reward",), "")
    sources = sources_by_name("--scorer", scorers.with_sources(request.scorers, known)) or ({} if before else default)
    return {name: source for name, source in known.items() if name in unfinished} | sources


def sources_by_name(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=SOURCE options as a dictionary."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals:
            raise UserError(f"{option} {text}: expected NAME=SOURCE")
        if not NAME.fullmatch(name):
            raise UserError(f"{option} {text}: a name has letters, digits, '.', '_', '-' and blanks, not {name!r}")
        if name in found:
            raise UserError(f"{option} {text}: {name!r} is there twice; give another name")
        found[name] = os.path.expanduser(source)  # which a shell does not do after an equals sign
    return found


def _prompts(before: Mapping[str, Any], request: Request) -> tuple[dict[str, PromptSet], dict[str, Any]]:
    """All prompt sets, the folder's and the request's, and what the settings say of them."""
    texts = [text if "=" in text else f"{Path(text).stem}={text}" for text in request.prompts]
    sources = sources_by_name("--prompts", texts) or ({} if before else {"embedded": "embedded"})
    own = {key: getattr(request, key) for key in PROMPT_OPTIONS}
    about = {name: {key: e[key] for key in ("source", *PROMPT_OPTIONS)} for name, e in before.items()}
    about |= {name: {"source": source} | own for name, source in sources.items()}
    # Both decide which image lies in which shard.
    for name, key in ((name, key) for name in before for key in PROMPT_OPTIONS):
        old, new = before[name][key], about[name][key]
        if old != new:
            raise UserError(f"--output {request.output}: prompts {name!r} have --{key} {old} there, not {new}")
    sets = {name: prompt_sets.read(e["source"], name).head(e["limit"]) for name, e in about.items()}
    counted = {name: {"count": len(one.prompts), "digest": one.digest} for name, one in sets.items()}
    return sets, {name: about[name] | counted[name] for name in sets}


def _lacking(shards: Iterable[Shard], columns: Sequence[str]) -> dict[str, set[str]]:
    """Column -> the models that have a shard without it."""
    lacking: dict[str, set[str]] = {column: set() for column in columns}
    for shard in shards:
        for column in set(columns) - sample_store.columns(shard.path, len(shard.rows)):
            lacking[column].add(shard.model)
    return lacking
