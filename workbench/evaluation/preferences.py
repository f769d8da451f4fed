"""Preference pairs for any model: drawn from prompts, scored by reward models, paired, and written for training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch

from workbench.common.distributed import pick_device
from workbench.common.errors import UserError
from workbench.common.outputs import output_file, require_own
from workbench.common.validation import writable_folder
from workbench.evaluation import drawing, filling, model_sources, pair_files, prompt_sets, scorers
from workbench.evaluation.drawing import Drawing, Drawn
from workbench.evaluation.model_sources import ModelSource
from workbench.evaluation.pairing import Counts, Pairs, Rule, agreement, combined, make_pairs
from workbench.evaluation.plan import sources_by_name
from workbench.evaluation.prompt_sets import OWN, PromptSet
from workbench.evaluation.scorers import Located
from workbench.evaluation.scoring import memory_of_samples

#: What is drawn where no prompts are named: prompt set of the small model -> times the images a prompt.
SMALL = {"train": 1, "validation": 2}
#: The small model's prompts that are written beside its pairs, to draw and to be judged on.
KEPT = ("embedded", "validation", "unseen")
SMALL_NAME = "small-diffusion"  #: of the model "embedded" in the pairs' files


@dataclass(frozen=True)
class Request:
    """The options of `python -m workbench.prefer`, unchecked; `--help` says what each is.

    Attributes:
        models, prompts, scorers: texts of the form NAME=SOURCE, for some of them SOURCE or NAME alone.
    """

    models: tuple[str, ...]
    base: str
    variant: str
    prompts: tuple[str, ...]
    limit: int
    scorers: tuple[str, ...]
    images: int
    every: bool
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    rule: Rule
    seed: int
    resolution: int
    dtype: str
    device: str
    batch_size: int
    image_format: str
    sheet: int
    out: Path
    work: Path

    @property
    def sampling(self) -> dict[str, Any]:
        """The options that decide how every image is drawn; of the steps the largest, for checks."""
        return {"dtype": self.dtype, "resolution": self.resolution, "steps": max(self.steps)}


@dataclass(frozen=True)
class Job:
    """A request, checked and ready to be worked on.

    Attributes:
        plans: the drawings of each prompt set, by its name, and the shards that keep them.
        prompt_files: name of a file -> the prompts to write into it.
    """

    request: Request
    device: torch.device
    models: Mapping[str, ModelSource]
    scorers: Sequence[Located]
    plans: Mapping[str, tuple[list[Drawing], list[drawing.Batch]]]
    prompt_files: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Made:
    """The pairs of a prompt set, written.

    Attributes:
        name: of the prompt set.
        prompts: how many it has.
        counts: agreement among scorers and labels.
    """

    name: str
    prompts: int
    pairs: Pairs
    counts: list[Counts]

    @property
    def ties(self) -> int:
        """How many of the pairs are ties, which training leaves out."""
        return sum(one.label == 0.5 for one in self.pairs.made)


def prepare(request: Request) -> Job:
    """Find and check everything that a request names, before anything is drawn or written.

    Raises:
        UserError: an option is wrong, or a file that would be written is somebody else's.
        Failure: something cannot be fetched.
    """
    device = pick_device(request.device)
    prompts, times = _prompts(request)
    located = _scorers(request.scorers, prompts)
    models = _models(request)
    about = {name: model_sources.describe(one, device, request.sampling) for name, one in models.items()}
    _require_enough(request, len(models), {name: len(one.prompts) for name, one in prompts.items()})
    plans = {}
    for part, (name, one) in enumerate(prompts.items()):
        drawings = drawing.plan(
            one.prompts,
            request.images * times[name],
            list(models),
            steps=request.steps,
            guidance=request.guidance,
            every=request.every,
            # Prompt sets never share noise, whatever the seed.
            seed=len(prompts) * request.seed + part,
        )
        plans[name] = drawings, drawing.batches(drawings, request.work / name, about, request.image_format)
    files = {} if request.prompts else {f"{OWN[name]}_prompts.txt": prompt_sets.read(name).prompts for name in KEPT}
    writable_folder("--out", request.out)
    require_own(request.out, *files, *(file for name in prompts for file in _files(name)))
    for name in prompts:
        writable_folder("--work", request.work / name)
    return Job(request, device, models, located, plans, files)


def complete(job: Job) -> list[Made]:
    """Draw and score what is not there yet, then pair and write; stopped at any time, the same call goes on.

    Raises:
        UserError: no prompt has a pair.
        Failure: the device has no memory left, or a scorer does not give a number an image.
    """
    request = job.request
    for file, prompts in job.prompt_files.items():
        with output_file(request.out / file) as path:
            path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    shards = [batch for _, its in job.plans.values() for batch in its]
    with memory_of_samples(request.batch_size):
        # All images before all scores: a model that draws and a reward model are never in memory together.
        filling.draw(
            drawing.undrawn(shards, request.image_format),
            job.models,
            device=job.device,
            sampling=request.sampling,
            batch_size=request.batch_size,
        )
        for located in job.scorers:
            filling.score(
                located,
                drawing.unscored(shards, located),
                device=job.device,
                batch_size=request.batch_size,
                columns=partial(drawing.score_columns, located),
            )
    parts = range(len(job.plans))
    return [_pair(job, name, len(parts) * request.seed + part) for part, name in zip(parts, job.plans, strict=True)]


def _pair(job: Job, name: str, seed: int) -> Made:
    """Pair the images of a prompt set, and write what belongs to it."""
    request = job.request
    drawings, shards = job.plans[name]
    drawn = Drawn(drawings, shards, job.scorers)
    prompts: dict[str, list[int]] = {}
    for number, one in enumerate(drawings):
        prompts.setdefault(one.caption, []).append(number)
    pairs = make_pairs(drawn.scores, drawn.uids, list(prompts.values()), request.rule, seed)
    if not pairs.made:
        raise UserError(
            f"prompts {name}: no pair ({pairs.identical} of identical images, {pairs.close} closer than --gap "
            f"{request.rule.gap:g}); draw more --images a prompt, in more ways, or lower --gap"
        )
    total = combined(drawn.scores)
    # `data.scores` takes a name of letters, digits and underscores.
    columns = {scorer.replace("-", "_"): values for scorer, values in drawn.scores.items()} | drawn.parts
    several = {"score": total} if len(drawn.scores) > 1 else {}
    counts = agreement(pairs.made, drawn.scores)
    parquet, table, picture = (request.out / file for file in _files(name))
    if request.sheet:
        pair_files.write_sheet(picture, pairs.made, drawn, total, request.sheet)
    with output_file(table) as path:
        pl.DataFrame(counts, Counts._fields, orient="row").write_csv(path)
    # Last: where this file is, the others are too.
    pair_files.write(parquet, pairs.made, drawn, several | columns)
    return Made(name, len(prompts), pairs, counts)


def _files(name: str) -> tuple[str, str, str]:
    """The files of a prompt set: pairs, agreement, sheet."""
    return f"{name}.parquet", f"{name}_agreement.csv", f"{name}.png"


def _prompts(request: Request) -> tuple[dict[str, PromptSet], dict[str, int]]:
    """The prompt sets by name, each prompt once, and how many times `--images` each of its prompts gets."""
    texts = [text if "=" in text else f"{Path(text).stem}={text}" for text in request.prompts]
    sources = sources_by_name("--prompts", texts) or {name: name for name in SMALL}
    sets = {name: prompt_sets.read(source, name) for name, source in sources.items()}
    # A prompt that is there twice would get two groups of images, and a pair could not say of which.
    distinct = {name: list(dict.fromkeys(one.prompts))[: request.limit or None] for name, one in sets.items()}
    prompts = {name: one._replace(prompts=distinct[name], categories=[]) for name, one in sets.items()}
    return prompts, {name: 1 if request.prompts else SMALL[name] for name in prompts}


def _scorers(texts: Sequence[str], prompts: Mapping[str, PromptSet]) -> list[Located]:
    """The scorers, each of which can judge every prompt."""
    located = [scorers.locate(*each) for each in sources_by_name("--scorer", scorers.with_sources(texts)).items()]
    for scorer in located:
        for one in prompts.values():
            scorer.check(one.prompts)
    return located


def _models(request: Request) -> dict[str, ModelSource]:
    """The models by name."""
    sources = sources_by_name("--model", [_with_name(text) for text in request.models])
    return {name: model_sources.find(name, source, request.base, request.variant) for name, source in sources.items()}


def _with_name(text: str) -> str:
    """A model as NAME=SOURCE: by default the name is the source's last part."""
    if "=" in text and not Path(text).exists():
        return text
    name = SMALL_NAME if text == "embedded" else Path(text).name.partition("@")[0]
    return f"{name}={text}"


def _require_enough(request: Request, models: int, prompts: Mapping[str, int]) -> None:
    """Make sure that there are images to make pairs of, and not more than there is noise for.

    Raises:
        UserError: there are too few, too many, or not whole groups of four.
    """
    ways = models * len(request.steps) * len(request.guidance) if request.every else 1
    each = request.images * ways
    if request.rule.pairs == "fours" and each % 4:
        raise UserError(f"--images {request.images}: --pairs fours takes images by fours, and a prompt has {each}")
    if each < 2:
        raise UserError(f"--images {request.images}: a pair needs two images of a prompt; give at least 2")
    for name, count in prompts.items():
        if count * request.images * max(SMALL.values()) > drawing.SEEDS:
            raise UserError(
                f"--images {request.images}: {count} prompts of {name} would have more than {drawing.SEEDS} images; "
                "give less, or split the prompts"
            )
