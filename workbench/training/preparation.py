"""What all runs on the same model, data and measurements share: weights, encoded pairs, fixed draws, a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from workbench import models
from workbench.common import cache, distributed
from workbench.common.errors import UserError
from workbench.data.encoding import INDEX, Encoding, encode, open_store
from workbench.data.pairs import EncodedPairs
from workbench.data.rows import open_rows, read_prompts
from workbench.data.streaming import StreamedPairs
from workbench.models import Backend
from workbench.models.small.prompts import parse
from workbench.models.small.reward import ImageModel, Reward, concept_likelihood
from workbench.training.config import Config, Data, Diagnostics, Evaluation, Model
from workbench.training.diagnostics import BucketDiagnostics, Probe, Samples


@dataclass(frozen=True)
class Prepared:
    """What all runs on the same model, data and measurements share; computed once a process.

    Attributes:
        scorer: judges images, given where in the `plan` of the evaluation each is.
        baseline: the pretrained model's images of the whole plan.
    """

    backend: Backend
    train: EncodedPairs | StreamedPairs
    validation: EncodedPairs
    probe: Probe
    unseen: Probe
    diagnostics: BucketDiagnostics
    captions: list[str]
    scorer: Callable[[np.ndarray, Sequence[int]], Samples] | None
    baseline: Samples | None


def prepare(config: Config) -> Prepared:
    """Load and encode everything that a run of these settings needs, or reuse what this process has."""
    ready = _prepare(config.model, config.data, config.diagnostics, config.evaluation)
    ready.backend.offload()  # training needs none of the frozen parts
    return ready


@lru_cache(maxsize=2)
def _prepare(model: Model, source: Data, diagnostics: Diagnostics, asked: Evaluation) -> Prepared:
    device = distributed.pick_device(model.device)
    backend = open_backend(model)
    captions = _captions(source.prompts, judged=asked.seeds > 0) if asked.seeds or asked.grid else []
    train_pairs, validation_pairs = open_pairs(source, "train", backend), open_pairs(source, "validation", backend)
    assert isinstance(validation_pairs, EncodedPairs)
    pretrained = backend.denoiser(half=True)
    process = backend.process.to(device)
    probe, unseen = (
        Probe(
            backend.denoise,
            pretrained,
            pairs.sample(diagnostics.probe),
            process,
            size=diagnostics.probe,
            device=device,
            batch_size=diagnostics.batch_size,
        )
        for pairs in (train_pairs, validation_pairs)
    )
    buckets = BucketDiagnostics(
        backend.denoise,
        pretrained,
        validation_pairs,
        process,
        pretrained_digest=backend.digest(backend.DENOISER, "scheduler"),
        buckets=diagnostics.buckets,
        curve=diagnostics.pairs,
        draws=diagnostics.draws,
        device=device,
        batch_size=diagnostics.batch_size,
    )
    scorer: Callable[[np.ndarray, Sequence[int]], Samples] | None = None
    baseline = None
    if asked.seeds:
        reward, judge = Reward(models.ASSETS, device), ImageModel(models.ASSETS / "judge", device)
        names, seeds = plan(captions, asked.seeds)

        def score(images: np.ndarray, places: Sequence[int]) -> Samples:
            told, drawn = [names[i] for i in places], [seeds[i] for i in places]
            return Samples(told, drawn, images, reward(images, told), concept_likelihood(judge, images, told))

        key = cache.digest("samples-1", backend.digest(*backend.parts), captions, asked.model_dump_json())
        images = cache.cached(
            "samples", key, lambda: {"images": torch.from_numpy(draw(backend, pretrained, names, seeds, asked))}
        )["images"].numpy()
        scorer, baseline = score, score(images, range(len(names)))
    return Prepared(backend, train_pairs, validation_pairs, probe, unseen, buckets, captions, scorer, baseline)


def open_backend(model: Model) -> Backend:
    """The checkpoint that the settings name, in their precision."""
    return models.load(
        model.path,
        distributed.pick_device(model.device),
        getattr(torch, model.dtype),
        family=model.family,
        revision=model.revision,
        variant=model.variant,
        resolution=model.resolution,
    )


def encoding_of(source: Data, split: str) -> Encoding:
    """How the settings want a split encoded; mirrored pairs are for training alone."""
    if split == "train":
        return Encoding(source.limit, source.flip, source.dtype)
    return Encoding(source.validation_limit, False, source.dtype)


def open_pairs(source: Data, split: str, backend: Backend) -> EncodedPairs | StreamedPairs:
    """The pairs of a split, encoded first where they are not; training pairs may be streamed instead."""
    path = getattr(source, split)
    if (Path(path) / split / INDEX).is_file():  # what `encode --output` made of both splits
        path = str(Path(path) / split)
    if any(Path(path).glob("pairs-*.safetensors")) and not (Path(path) / INDEX).is_file():
        raise UserError(f"data.{split} = {path!r}: its encoding was not finished; run workbench.encode again")
    if (Path(path) / INDEX).is_file():
        if split == "train" and not source.cache:
            raise UserError(f"data.cache = false: {path} is encoded already; give the images, or leave it at true")
        asked = encoding_of(source, split)
        return open_store(Path(path), backend=backend, flip=asked.flip if split == "train" else None, limit=asked.limit)
    rows = open_rows(path, split)
    encoding = encoding_of(source, split)
    if split == "train" and not source.cache:
        return StreamedPairs(rows, backend, encoding)
    return encode(rows, backend, encoding)


def _captions(source: str, judged: bool) -> list[str]:
    captions = list(read_prompts(source))
    try:
        for caption in captions if judged else []:
            parse(caption)
    except ValueError as error:
        raise UserError(
            f"data.prompts = {source!r}: the ground-truth reward cannot judge this prompt ({error}); "
            "set evaluation.seeds=0 to draw without judging"
        ) from None
    return captions


def plan(captions: list[str], seeds: int) -> tuple[list[str], list[int]]:
    """Caption and seed of every image to draw: all captions with the first seed, then with the next."""
    return captions * seeds, [seed for seed in range(seeds) for _ in captions]


def draw(backend: Backend, denoiser: nn.Module, captions: list[str], seeds: list[int], asked: Evaluation) -> np.ndarray:
    """An image a caption, (N, H, W, 3); each process draws its share."""
    mine = distributed.spread(len(captions)).tolist()
    images = backend.sample(
        denoiser,
        [captions[i] for i in mine],
        [seeds[i] for i in mine],
        steps=asked.steps,
        guidance=asked.guidance,
        batch_size=asked.batch_size,
    )
    return distributed.collect(torch.from_numpy(images), len(captions)).numpy()
