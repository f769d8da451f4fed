"""Checkpoints in diffusers' layout: found on disk or on the hub, checked, and what is wrong with them in one line.

They may come from anybody: nothing in one is run or followed out of its folder, weights are never read from pickles,
and a library is asked to build only what the weights beside it can fill.
"""

import hashlib
import importlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import safe_open

from workbench.common.errors import Failure, UserError, one_line, shown
from workbench.common.validation import is_place

ASSETS = Path(str(files("workbench"))) / "models" / "small" / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: Keys of a config.json that say nothing of the numbers; `dtype` is of storage, the backend chooses its own.
PROVENANCE = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype")
WHOLE = 64 * 2**20  # files up to this size are hashed whole
LONGEST = 2**20  # bytes of a JSON file that describes something
#: The classes that a part may name, by library; a class is looked up nowhere else.
CLASSES = {
    "diffusers": ("AutoencoderKL", "UNet2DConditionModel", "SD3Transformer2DModel"),
    "transformers": (
        "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "CLIPTokenizerFast",
        "T5EncoderModel", "T5Tokenizer", "T5TokenizerFast",
    ),
}  # fmt: skip


@contextmanager
def explained(what: str) -> Iterator[None]:
    """What a library says of files that it cannot read becomes one line; also a decorator."""
    try:
        yield
    except (UserError, Failure):
        raise
    except Exception as error:  # diffusers, transformers, tokenizers and peft raise all kinds, and plain Exception
        if "out of memory" in str(error):
            raise
        raise UserError(f"{what} cannot be loaded ({one_line(error)})") from None


def read_json(path: Path, what: str, longest: int = LONGEST) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        what: the thing that it describes, for messages.
        longest: that such a file gets, in bytes.
    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        if path.stat().st_size > longest:
            raise UserError(f"{what}: {path.name} is too long to be what it should be")
        found = json.loads(path.read_text("utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path.name} cannot be read ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{what}: {path.name} holds {shown(found)}, not an object")
    return found


def load_network(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """A network from a folder with config.json and safetensors, whole and finite.

    Args:
        kind: its class, of diffusers or transformers.
        what: it, for messages.
        options: of `from_pretrained`; pickles are never read.
    Raises:
        UserError: it is damaged, incomplete, not a network's weights, or its config says something else.
    """
    check_weights(folder, what, options.get("variant", ""))
    with explained(what):
        network, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    for key, problem in (
        ("missing_keys", "is not there"),
        ("mismatched_keys", "has another shape than config.json says"),
    ):
        if info.get(key):
            first = sorted(name if isinstance(name, str) else name[0] for name in info[key])[0]
            raise UserError(f"{what}: {first} {problem} ({len(info[key])} in all)")
    require_finite(network, what)
    return network


def require_finite(network: Any, what: str) -> None:
    """Raise UserError unless every weight of a network is a number."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{what}: {name} has values that are not finite")


def check_weights(folder: Path, what: str, variant: str = "") -> None:
    """Look at the heads of a part's weight files and at its config, before a library builds what they describe.

    Raises:
        UserError: they cannot be read, are no floating-point numbers, or lie elsewhere; or the config describes more.
    """
    for index in folder.glob("*.index*.json"):
        listed = read_json(index, what).get("weight_map")
        for name in listed.values() if isinstance(listed, dict) else [listed]:
            if not (isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")):
                raise UserError(f"{what}: {index.name} names {shown(name)}, not a safetensors file beside it")
    files = sorted(folder.glob("*.safetensors"))
    shapes = read_shapes([path for path in files if variant and f".{variant}" in path.name] or files, what)
    if not shapes:
        raise UserError(f"{what}: no weights in safetensors in {folder}")
    check_declared(read_json(folder / "config.json", what), shapes, what)


def read_shapes(files: Sequence[Path], what: str) -> dict[str, list[int]]:
    """Shapes of the tensors in safetensors files, by name, from the files' heads alone.

    Raises:
        UserError: one cannot be read, or holds weights that are no floating-point numbers.
    """
    shapes: dict[str, list[int]] = {}
    for path in files:
        with explained(f"{what}: {path.name}"), safe_open(path, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (no mapping)
                tensor = stream.get_slice(name)
                if name.endswith(("weight", "bias")) and not re.match("B?F", tensor.get_dtype()):
                    raise UserError(f"{what}: {name} is stored as {tensor.get_dtype()}, expected floating point")
                shapes[name] = tensor.get_shape()
    return shapes


def check_declared(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Raise UserError where a config counts more layers than there are tensors, or beyond the largest of them.

    Args:
        shapes: of the tensors beside it, by name.
    """
    most = max(2**16, *(math.prod(shape) for shape in shapes.values()))

    def check(key: str, value: Any) -> None:
        largest = len(shapes) if "layers" in key else math.isqrt(most) if key == "pos_embed_max_size" else most
        if isinstance(value, int | float) and abs(value) > largest:
            raise UserError(f"{what}: {key} = {shown(value)} in its config, which is more than its weights hold")
        if isinstance(value, list) and len(value) > max(64, len(shapes)):
            raise UserError(f"{what}: {key} in its config has {len(value)} entries, more than its weights have tensors")
        for name, inner in value.items() if isinstance(value, dict) else ():
            check(name, inner)
        for inner in value if isinstance(value, list) else ():
            check(key, inner)

    check("config", config)


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder on this machine.

    Attributes:
        source: what the user called it.
        index: its model_index.json, checked.
        variant: which of its weight files are meant, such as "fp16"; "" = the plain ones.
    """

    source: str
    folder: Path
    index: Mapping[str, Any]
    variant: str = ""

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"model.path = {shown(self.source)}"

    @property
    def pipeline(self) -> str:
        """Name of the diffusers pipeline that it belongs to."""
        return str(self.index.get("_class_name"))

    @property
    def parts(self) -> dict[str, tuple[str | None, str | None]]:
        """Library and class of every part, by its name; a part that was left out has neither."""
        return {name: (entry[0], entry[1]) for name, entry in self.index.items() if isinstance(entry, list)}

    def kind(self, part: str) -> Any:
        """The class of a part.

        Raises:
            UserError: none that a checkpoint may name.
        """
        library, name = self.parts.get(part, (None, None))
        if library is None or name not in CLASSES.get(library, ()):
            raise UserError(f"{self.name}: {part} is a {library}.{name}, which is not read here")
        return getattr(importlib.import_module(library), str(name))

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """What a part's JSON file says."""
        return read_json(self.folder / part / file, f"{self.name}: {part}")

    def number(self, part: str, key: str, default: Any, low: float, high: float, file: str = "config.json") -> Any:
        """A number of a part's JSON file.

        Raises:
            UserError: it is none from `low` to `high`.
        """
        value = self.config(part, file).get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{self.name}: {part} has {key} = {shown(value)}, expected a number from {low} to {high}")
        return value

    def load(self, part: str, **options: Any) -> Any:
        """A part with weights."""
        options |= {"variant": self.variant} if self.variant else {}
        return load_network(self.kind(part), self.folder / part, f"{self.name}: {part}", **options)

    def require(self, *parts: str) -> None:
        """Raise UserError unless these parts are there and can be read; one that the index gives as null may lack."""
        missing = [p for p in parts if self.parts.get(p, "") != (None, None) and not (self.folder / p).is_dir()]
        if missing:
            raise UserError(f"{self.name}: no {', '.join(missing)} in {self.folder}")
        for part in parts:
            folder = self.folder / part
            if not folder.is_dir() or part == "scheduler":
                continue
            kind = self.kind(part)
            if "Tokenizer" in kind.__name__:
                continue
            pickled = [*folder.glob("*.bin"), *folder.glob("*.ckpt")]
            if pickled and not any(folder.glob("*.safetensors")):
                raise UserError(f"{self.name}: {part} has only pickled weights ({pickled[0].name}); give safetensors")
            check_weights(folder, f"{self.name}: {part}", self.variant)

    def copy_parts(self, folder: Path, without: str) -> None:
        """Copy the files of every part but one, to the byte but for what `used_in_float32` changes."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        for part in self.parts:
            if part == without or not (self.folder / part).is_dir():
                continue
            (folder / part).mkdir(exist_ok=True)
            for file in sorted((self.folder / part).iterdir()):
                if file.is_file():
                    shutil.copyfile(file, folder / part / file.name)
            config = folder / part / "config.json"
            if part.startswith("text_encoder") and config.is_file():
                used_in_float32(config)


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
    if not is_place(source) or not is_place(variant) or "/" in variant:
        raise UserError(f"model.path = {shown(source)}, variant {shown(variant)}: nothing has such a name")
    folder = ASSETS / "model" if source == "embedded" else Path(source)
    if not folder.exists() and HUB_ID.fullmatch(source):
        folder = _download(source, revision, variant)
    elif revision:
        raise UserError(f"model.revision = {revision!r}: {source} is a folder here and no hub id")
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"model.path = {shown(source)}: not a checkpoint folder in diffusers' layout (no model_index.json in "
            f"{folder})"
        )
    index = read_json(path, f"model.path = {shown(source)}")
    for part, entry in index.items():  # parts are folders
        if isinstance(entry, list) and not (part.isidentifier() and _is_class(entry)):
            raise UserError(
                f"model.path = {shown(source)}: {shown(part)} = {shown(entry)} in model_index.json, expected a part's "
                "name, library and class"
            )
    return Checkpoint(source, folder, index, variant)


def _is_class(entry: list) -> bool:
    return len(entry) == 2 and (all(isinstance(x, str) for x in entry) or entry == [None, None])


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
            said = read_json(path, str(path.parent))
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
