"""Checkpoints in diffusers' layout: found on disk or on the hub, checked, and what is wrong with them in one line."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from workbench.errors import Failure, UserError, one_line

ASSETS = Path(str(files("workbench"))) / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: Keys of a config.json that say nothing of the numbers; `dtype` is of storage, the backend chooses its own.
PROVENANCE = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype")
WHOLE = 64 * 2**20  # files up to this size are hashed whole


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder on this machine.

    Attributes:
        source: what the user called it.
        index: its model_index.json.
        options: how its weights are read: never from pickles.
    """

    source: str
    folder: Path
    index: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """Name of the diffusers pipeline that it belongs to."""
        return str(self.index.get("_class_name"))

    def config(self, part: str) -> dict[str, Any]:
        """The config.json of a part."""
        with self.explained(part):
            return json.loads((self.folder / part / "config.json").read_text())

    def require(self, *parts: str) -> None:
        """Raise UserError unless these parts are there; a part that the index gives as null may be left out."""
        missing = [p for p in parts if self.index.get(p, [0])[0] is not None and not (self.folder / p).is_dir()]
        if missing:
            raise UserError(f"model.path = {self.source!r}: no {', '.join(missing)} in {self.folder}")
        for part in parts:
            folder = self.folder / part
            pickled = [*folder.glob("*.bin"), *folder.glob("*.ckpt")] if folder.is_dir() else []
            if pickled and not any(folder.glob("*.safetensors")):
                raise UserError(
                    f"model.path = {self.source!r}: {part} has only pickled weights ({pickled[0].name}); give "
                    "safetensors"
                )

    def copy_parts(self, folder: Path, without: str) -> None:
        """Copy every part but one, to the byte but for what `used_in_float32` changes."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        for part in self.index:
            if part == without or not (self.folder / part).is_dir():
                continue
            shutil.copytree(self.folder / part, folder / part, dirs_exist_ok=True)
            config = folder / part / "config.json"
            if part.startswith("text_encoder") and config.is_file():
                used_in_float32(config)

    @contextmanager
    def explained(self, part: str = "") -> Iterator[None]:
        """What goes wrong while it is read becomes one line."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if isinstance(error, UserError) or "out of memory" in str(error):
                raise
            where = f"{part} " if part else ""
            raise UserError(f"model.path = {self.source!r}: {where}cannot be loaded ({one_line(error)})") from None


def used_in_float32(config: Path) -> None:
    """Let a text encoder's config.json say float32, below which its weights may be stored.

    transformers would use them as they are stored, diffusers the denoiser in float32, and the two would not fit.
    """
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def fetch(source: str, revision: str = "", variant: str = "") -> Checkpoint:
    """A checkpoint by folder, hub id or "embedded"; from the hub through its own cache, with its own token handling.

    Raises:
        UserError: no such folder, or not a diffusers checkpoint.
        Failure: the hub does not answer, or does not have it.
    """
    folder = ASSETS / "model" if source == "embedded" else Path(source)
    if not folder.exists() and HUB_ID.fullmatch(source):
        folder = _download(source, revision, variant)
    elif revision:
        raise UserError(f"model.revision = {revision!r}: {source} is a folder here and no hub id")
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"model.path = {source!r}: not a checkpoint folder in diffusers' layout (no model_index.json in {folder})"
        ) from None
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    return Checkpoint(source, folder, index, options | ({"variant": variant} if variant else {}))


def _download(source: str, revision: str, variant: str) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"model.path = {source!r}" + (f", model.revision = {revision!r}" if revision else "")
    try:
        return Path(
            DiffusionPipeline.download(source, revision=revision or None, variant=variant or None, use_safetensors=True)
        )
    except GatedRepoError:
        raise Failure(
            f"{what}: needs its licence accepted on the hub and a token (hf auth login, or HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{what}: no such revision on the hub") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what}: neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
        ) from None
    except (OSError, ValueError) as error:
        raise Failure(
            f"{what}: no such folder, and the hub could not be reached for it; give a local diffusers folder, or try "
            f"again ({one_line(error)[:200]})"
        ) from None


def family_of(checkpoint: Checkpoint, pipelines: Mapping[str, str]) -> str:
    """The family whose pipeline the checkpoint names.

    Args:
        pipelines: diffusers pipeline -> family.
    Raises:
        UserError: none of these.
    """
    if checkpoint.pipeline not in pipelines:
        raise UserError(
            f"model.path = {checkpoint.source!r}: a checkpoint for {checkpoint.pipeline}; expected one of "
            + ", ".join(pipelines)
        )
    return pipelines[checkpoint.pipeline]


def digest_of(paths: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and contents; of a file above 64 MiB the first and last MiB stand for its contents.

    A config.json counts by what it says of the model, not where it came from or which library wrote it.
    """
    digest = hashlib.sha256()
    for path in paths:
        if path.name == "config.json":
            said = json.loads(path.read_text())
            digest.update(json.dumps({k: v for k, v in said.items() if k not in PROVENANCE}, sort_keys=True).encode())
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as stream:
            if size <= WHOLE:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                digest.update(stream.read(2**20))
                stream.seek(-(2**20), 2)
                digest.update(stream.read())
    return digest.hexdigest()
