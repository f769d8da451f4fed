"""What all runs on the same model, data and measurements share: weights, encoded pairs, fixed draws, a baseline."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from workbench import models
from workbench.common import distributed
from workbench.common.errors import UserError
from workbench.data.columns import Names
from workbench.data.encoding import INDEX, Encoding, encode, open_store
from workbench.data.listed import open_source
from workbench.data.pairs import EncodedPairs
from workbench.data.rows import Rows
from workbench.data.streaming import StreamedPairs
from workbench.data.subset import drawn
from workbench.models import Backend
from workbench.models.lora import LORA_FILE
from workbench.training.config import Config
from workbench.training.diagnostics import BucketDiagnostics, Probe
from workbench.training.samples import Sampling, prepare_sampling, read_captions
from workbench.training.tables import Data, Model

Pairs: TypeAlias = EncodedPairs | StreamedPairs


@dataclass(frozen=True)
class Prepared:
    """What all runs on the same model, data and measurements share.

    A run changes nothing of it, so its owner may hand it to one run after another.

    Attributes:
        probe: winners of the training pairs, on which the reference's rule measures the divergence.
        unseen: the same of the validation pairs.
    """

    backend: Backend
    train: Pairs
    validation: EncodedPairs
    probe: Probe
    unseen: Probe
    diagnostics: BucketDiagnostics
    sampling: Sampling

    @property
    def data(self) -> list[str]:
        """Digests of what a run learns from and starts with."""
        start = self.backend.digest(self.backend.DENOISER, "scheduler")
        return [self.train.digest, self.validation.digest, start]


def prepare(config: Config) -> Prepared:
    """Load, encode and measure what runs of these settings share. Their other sections play no part.

    Raises:
        UserError: a file, a checkpoint or a prompt is not what it should be.
        Failure: the hub does not answer, or the disk is full.
    """
    backend, settings = open_backend(config.model), config.diagnostics
    _require_beginnings(config, backend)
    captions = read_captions(config.data.prompts, config.evaluation)  # first: encoding the pairs may take hours
    process = backend.process.to(backend.device)
    train, validation = open_pairs(config.data, "train", backend), open_pairs(config.data, "validation", backend)
    # Only training pairs are streamed: diagnostics pick validation pairs by their number, again and again.
    assert isinstance(validation, EncodedPairs)
    pretrained = backend.denoiser(half=True)  # in here alone: what it predicts is kept, it is not
    probe, unseen = (
        Probe(
            backend.denoise,
            pretrained,
            pairs.sample(settings.probe),
            process,
            size=settings.probe,
            device=backend.device,
            batch_size=settings.batch_size,
        )
        for pairs in (train, validation)
    )
    diagnostics = BucketDiagnostics(
        backend.denoise,
        pretrained,
        validation,
        process,
        pretrained_digest=backend.digest(backend.DENOISER, "scheduler"),
        buckets=settings.buckets,
        curve=settings.pairs,
        draws=settings.draws,
        device=backend.device,
        batch_size=settings.batch_size,
    )
    sampling = prepare_sampling(captions, config.evaluation, backend, pretrained)
    return Prepared(backend, train, validation, probe, unseen, diagnostics, sampling)


def _require_beginnings(config: Config, backend: Backend) -> None:
    """Make sure that the weights which policy and reference begin with are there, before pairs are encoded for hours.

    Raises:
        UserError: no such folder, or no weights of the kind that is trained in it.
    """
    wanted = LORA_FILE if config.lora.rank else backend.DENOISER
    for key in ("policy", "reference"):
        place = getattr(config.model, key)
        if place and not (Path(place) / wanted).exists():
            kind = "LoRA weights" if config.lora.rank else "a denoiser of a full fine-tune"
            raise UserError(f"model.{key} = {place!r}: no {wanted} in it; expected a folder with {kind}")


class Preparations:
    """Prepares each combination of model, data and measurements once, for a process that runs many runs.

    Args:
        keep: how many of the latest stay in memory.
    """

    def __init__(self, keep: int = 2):
        self._keep = keep
        self._kept: dict[tuple, Prepared] = {}

    def __call__(self, config: Config) -> Prepared:
        """What runs of these settings share."""
        # The sections that `prepare` reads; runs that differ in others alone share the result.
        key = config.model, config.data, config.diagnostics, config.evaluation
        prepared = self._kept.pop(key, None) or prepare(config)
        self._kept[key] = prepared  # the last one is the latest
        for oldest in list(self._kept)[: -self._keep]:
            del self._kept[oldest]
        return prepared


def open_backend(model: Model) -> Backend:
    """The checkpoint that the settings name, in their precision."""
    return models.load(
        model.path,
        distributed.pick_device(model.device),
        getattr(torch, model.dtype),
        family=model.family,
        revision=model.revision,
        variant=model.variant,
        vae=model.vae,
        resolution=model.resolution,
    )


def encoding_of(source: Data, split: str) -> Encoding:
    """How the settings want a split encoded; mirrored pairs and random crops are for training alone."""
    if split == "train":
        return Encoding(source.limit, source.flip, source.dtype, source.scores, source.resize, source.crop)
    return Encoding(source.validation_limit, False, source.dtype, resize=source.resize)


def names_of(source: Data) -> Names:
    """What the columns of the pairs are called."""
    return Names(**source.columns.model_dump())


def rows_of(source: Data, split: str) -> Rows:
    """The rows of a split as they are encoded; of training rows a random part, if the settings want one.

    Raises:
        UserError, Failure: as `open_source` and `drawn`.
    """
    encoding = encoding_of(source, split)
    rows = open_source(getattr(source, split), split, encoding.scores, names_of(source))
    if split == "train" and source.limit and source.limit_seed:
        return drawn(rows, source.limit, source.limit_seed, encoding.scores)
    return rows


def open_pairs(source: Data, split: str, backend: Backend) -> Pairs:
    """The pairs of a split, encoded first where they are not; training pairs may be streamed instead.

    Raises:
        UserError: no such pairs, or an encoding of them that is unfinished or of another kind.
    """
    pairs, edge = _pairs(source, split, backend), backend.resolution
    return pairs.with_condition(backend.pair_condition(edge, edge, 0, 0)) if source.sizes == "resolution" else pairs


def require_sources(config: Config) -> None:
    """Check that prompts and pairs are there, with their columns: `prepare` comes to some of them after hours.

    Of files here it reads little; of the hub it asks as much as `prepare` does before it encodes.

    Raises:
        UserError: something is missing, or of another kind.
        Failure: the hub does not answer, or has no such pairs.
    """
    read_captions(config.data.prompts, config.evaluation)
    for split in ("train", "validation"):
        # What is encoded already is no rows; `prepare` looks at it.
        if _store(config.data, split) is None:
            rows_of(config.data, split)


def _store(source: Data, split: str) -> str | None:
    """The folder of a split that is encoded already; None where the settings name something else.

    Raises:
        UserError: its encoding is unfinished.
    """
    path = getattr(source, split)
    if (Path(path) / split / INDEX).is_file():  # what `encode --output` made of both splits
        return str(Path(path) / split)
    if (Path(path) / INDEX).is_file():
        return str(path)
    # The index is written last, so shards without one are those of an encoding that was killed.
    if any(any(place.glob("pairs-*.safetensors")) for place in (Path(path), Path(path) / split)):
        raise UserError(f"data.{split} = {path!r}: its encoding was not finished; run workbench.encode again")
    return None


def _pairs(source: Data, split: str, backend: Backend) -> Pairs:
    path, encoding = _store(source, split), encoding_of(source, split)
    if path is not None:
        if split == "train" and not source.cache:
            raise UserError(f"data.cache = false: {path} is encoded already; give the images, or leave it at true")
        # For validation a store is taken however it was flipped and cropped.
        flip, crop = (encoding.flip, encoding.crop) if split == "train" else (None, "")
        pairs = open_store(
            Path(path),
            backend=backend,
            flip=flip,
            limit=encoding.limit,
            scores=encoding.scores,
            resize=encoding.resize,
            crop=crop,
        )
        if split == "train" and source.limit_seed and 0 < encoding.limit < pairs.counts.get("used", 0):
            raise UserError(
                f"data.limit_seed = {source.limit_seed}: {path} is encoded already, with more pairs than "
                f"{encoding.limit}; give the images, or encode with this setting"
            )
        return pairs
    rows = rows_of(source, split)
    if split == "train" and not source.cache:
        return StreamedPairs(rows, backend, encoding)
    return encode(rows, backend, encoding)
