"""The models that an evaluation compares: where each comes from, how it is found, described and opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench import models, tracking
from workbench.common.cache import digest
from workbench.common.errors import Failure, UserError
from workbench.common.validation import is_place
from workbench.models import Backend, digest_of
from workbench.models.safe_loading import read_shapes

#: What a folder of trained weights alone holds.
WEIGHTS = ("unet", "transformer", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class ModelSource:
    """Where a model to draw with comes from.

    Attributes:
        source: as the user said it, or runs:/ID for a run of a study.
        base: diffusers folder, hub id or "embedded", with @REVISION where one was named.
        family, variant, vae: as `models.load` takes them.
        folder: trained weights to use on the base; None = the base itself.
    """

    name: str
    source: str
    base: str
    family: str = "auto"
    variant: str = ""
    vae: str = ""
    folder: Path | None = None


def expand(texts: Sequence[str]) -> list[str]:
    """--model options, with study:STUDY replaced by NAME=runs:/ID for each of its runs that kept weights.

    Raises:
        UserError: no such study, or no tracking store, which is not made.
    """
    expanded: list[str] = []
    for text in texts:
        if text.startswith("study:"):
            kept = tracking.kept_models(tracking.connect_to_read(), text.removeprefix("study:"))
            expanded += [f"{name}=runs:/{run_id}" for name, run_id in kept.items()]
        else:
            expanded.append(text)
    return expanded


def find(name: str, source: str, base: str, variant: str) -> ModelSource:
    """Find the model that a source names.

    Args:
        base: the model on which weights alone are used.
        variant: weight files of hub models.
    Raises:
        UserError: no such run, or no tracking store, which is not made; or weights alone and no base.
    """
    if source.startswith("runs:/"):  # MLflow is asked only where a model is a tracked run's
        params, folder = tracking.kept_model(tracking.connect_to_read(), source.removeprefix("runs:/"))
        names = ("path", "revision", "family", "variant", "vae")
        path, revision, family, own, vae = (params.get(f"model.{k}", "") for k in names)
        return ModelSource(name, source, f"{path}@{revision}" if revision else path, family or "auto", own, vae, folder)
    if not is_place(source):
        raise UserError(f"--model {name}={source}: no file or folder has such a name")
    folder = Path(source)
    # What is neither a checkpoint nor weights goes on to `models.load`, which says what is wrong with it.
    if (folder / "model_index.json").is_file() or not any((folder / part).exists() for part in WEIGHTS):
        return ModelSource(name, source, source, variant=variant)
    if not base:
        raise UserError(f"--model {name}={source}: holds trained weights alone; say on which model with --base")
    return ModelSource(name, source, base, variant=variant, folder=folder)


def open_backend(model: ModelSource, device: torch.device, sampling: Mapping[str, Any]) -> Backend:
    """Open the backend of a model, with its base's weights.

    Args:
        sampling: settings dtype and resolution.
    Raises:
        UserError, Failure: the model is missing, or not what it should be; names the option.
    """
    # A folder may have an @ in its name: only what is no folder is split.
    path, _, revision = (model.base, "", "") if Path(model.base).exists() else model.base.partition("@")
    try:
        return models.load(
            path,
            device,
            getattr(torch, sampling["dtype"]),
            family=model.family,
            revision=revision,
            variant=model.variant,
            vae=model.vae,
            resolution=sampling["resolution"],
        )
    except (UserError, Failure) as error:
        raise type(error)(f"--model {model.name}={model.source}: {error}") from None


def open_model(model: ModelSource, device: torch.device, sampling: Mapping[str, Any]) -> tuple[Backend, nn.Module]:
    """A model's backend and its denoiser, with the trained weights where there are some."""
    backend = open_backend(model, device, sampling)
    return backend, backend.load_trained(model.folder) if model.folder else backend.denoiser()


def describe(model: ModelSource, device: torch.device, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation's settings file says of a model: all that decides its samples."""
    backend = open_backend(model, device, sampling)
    backend.require_steps(sampling["steps"])
    own = sorted(path for path in model.folder.rglob("*") if path.is_file()) if model.folder else []
    # Headers only, but now: damaged weights are found before another model's images are drawn.
    read_shapes([path for path in own if path.suffix == ".safetensors"], f"--model {model.name}={model.source}")
    return {
        "source": model.source,
        "base": model.base if model.folder else "",
        "variant": model.variant,
        "sampler": backend.sampler,
        "resolution": backend.resolution,
        "digest": digest(backend.digest(*backend.parts), digest_of(own)),
    }
