"""Checkpoints in diffusers' layout, from a folder or from the hub.

A checkpoint is a folder with model_index.json, which names a pipeline and its components, and a folder a component.
`fetch` finds and opens one; `Checkpoint` answers what its files say, checked by `safe_loading`.
"""

import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from workbench.common.errors import Failure, UserError, one_line, shown
from workbench.common.reading import near, require_regular
from workbench.common.validation import is_place
from workbench.models.safe_loading import check_weights, load_network, read_json

#: The small model that comes with the workbench, its reward model, judge and pairs.
ASSETS = Path(str(files("workbench"))) / "models" / "small" / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: Keys of a config.json that do not change what a network computes; `dtype` is of storage, the backend chooses its own.
PROVENANCE = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype")
#: Files up to this size, bytes, are hashed whole by `digest_of`.
HASHED_WHOLE = 64 * 2**20
#: The classes that a component may name, by library. No other is looked up: a class name from a file must not import
#: anything that the families do not need.
CLASSES = {
    "diffusers": (
        "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderDC",
        "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel",
        "QwenImageTransformer2DModel", "ZImageTransformer2DModel", "SanaTransformer2DModel",
    ),
    "transformers": (
        "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "CLIPTokenizerFast",
        "T5EncoderModel", "T5Tokenizer", "T5TokenizerFast",
        "Qwen2_5_VLForConditionalGeneration", "Qwen3Model", "Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast",
        "Gemma2Model", "Gemma2ForCausalLM", "GemmaTokenizer", "GemmaTokenizerFast",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder on this machine.

    Attributes:
        source: what the user gave: a folder, a hub id or "embedded".
        folder: where it lies.
        index: its model_index.json, checked.
        variant: which of its weight files to read, such as "fp16"; "" = the plain ones.
        replaced: folders of components that take the place of the checkpoint's own.
    """

    source: str
    folder: Path
    index: Mapping[str, Any]
    variant: str = ""
    replaced: Mapping[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The checkpoint as messages call it."""
        return f"model.path = {shown(self.source)}"

    @property
    def pipeline(self) -> str:
        """Name of the diffusers pipeline that the checkpoint was saved from."""
        return str(self.index.get("_class_name"))

    @property
    def parts(self) -> dict[str, tuple[str | None, str | None]]:
        """Library and class of every component, by its name; (None, None) for a component that was left out."""
        return {name: (entry[0], entry[1]) for name, entry in self.index.items() if isinstance(entry, list)}

    def place(self, part: str) -> Path:
        """The folder of a component."""
        return self.replaced.get(part, self.folder / part)

    def kind(self, part: str) -> Any:
        """The class of a component.

        Raises:
            UserError: the checkpoint names a class that is not in CLASSES.
        """
        library, name = self.parts.get(part, (None, None))
        if library is None or name not in CLASSES.get(library, ()):
            raise UserError(f"{self.name}: {part} is a {library}.{name}, which is not read here")
        return getattr(importlib.import_module(library), str(name))

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The object in a component's JSON file."""
        return read_json(self.place(part) / file, f"{self.name}: {part}")

    def number(self, part: str, key: str, default: Any, low: float, high: float, file: str = "config.json") -> Any:
        """A number in a component's JSON file.

        Args:
            default: where the file does not have the key.
        Raises:
            UserError: it is no number, or not within low..high.
        """
        value = self.config(part, file).get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{self.name}: {part} has {key} = {shown(value)}, expected a number from {low} to {high}")
        return value

    def load(self, part: str, **options: Any) -> Any:
        """A component that has weights, loaded by `safe_loading.load_network` with these options."""
        # A component from elsewhere has its plain weights, whatever variant the checkpoint's own have.
        options |= {"variant": self.variant} if self.variant and part not in self.replaced else {}
        return load_network(self.kind(part), self.place(part), f"{self.name}: {part}", **options)

    def require(self, *parts: str) -> None:
        """Check that components are there and that their weights and configs can be read.

        A component that model_index.json gives as null may be missing.

        Raises:
            UserError: one is missing, has only pickled weights, or fails `safe_loading.check_weights`.
        """
        missing = [p for p in parts if self.parts.get(p, "") != (None, None) and not self.place(p).is_dir()]
        if missing:
            raise UserError(f"{self.name}: no {', '.join(missing)} in {self.folder}")
        for part in parts:
            folder = self.place(part)
            if not folder.is_dir() or part == "scheduler":
                continue
            kind = self.kind(part)
            # Tokenizers have no weights; neither has a scheduler, above.
            if "Tokenizer" in kind.__name__:
                continue
            pickled = [*folder.glob("*.bin"), *folder.glob("*.ckpt")]
            if pickled and not any(folder.glob("*.safetensors")):
                raise UserError(f"{self.name}: {part} has only pickled weights ({pickled[0].name}); give safetensors")
            check_weights(folder, f"{self.name}: {part}", "" if part in self.replaced else self.variant)

    def copy_parts(self, folder: Path, without: str) -> None:
        """Copy the files of every component but one into a folder, byte for byte but for `declare_float32`."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        for part in self.parts:
            if part == without or not self.place(part).is_dir():
                continue
            (folder / part).mkdir(exist_ok=True)
            # Files are copied and not saved by the library, so that digests of encoded pairs stay true of the copy.
            for file in sorted(self.place(part).iterdir()):
                if file.is_file():
                    shutil.copyfile(file, folder / part / file.name)
            config = folder / part / "config.json"
            if part.startswith("text_encoder") and config.is_file():
                declare_float32(config)


def declare_float32(config: Path) -> None:
    """Set a text encoder's dtype to float32 in its config.json, whatever precision its weights are stored in.

    transformers loads weights in the dtype that the config names, diffusers the denoiser in float32; a plain
    `from_pretrained` of the saved pipeline would mix the two and fail.
    """
    content = json.loads(config.read_text("utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def fetch(source: str, revision: str = "", variant: str = "", vae: str = "") -> Checkpoint:
    """Open a checkpoint; one on the hub is downloaded first, through the hub's own cache and token.

    Args:
        source: a folder, a hub id, or "embedded" for the small model that comes with the workbench.
        revision: branch, tag or commit of a hub id.
        variant: see Checkpoint.
        vae: folder or hub id of an autoencoder that takes the place of the checkpoint's own; "" = none.
    Raises:
        UserError: no such folder or hub model, or not a diffusers checkpoint, or an autoencoder of another kind.
        Failure: the hub does not answer, or wants a licence accepted.
    """
    # First: over a name that is too long, the file system raises an error where a question was asked.
    if not is_place(source) or not is_place(variant) or "/" in variant:
        raise UserError(f"model.path = {shown(source)}, variant {shown(variant)}: nothing has such a name")
    folder = ASSETS / "model" if source == "embedded" else Path(source)
    # A folder here comes before a hub id of the same name.
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
    for part, entry in index.items():
        # A component's name becomes a path below the folder: an identifier cannot lead out of it.
        if isinstance(entry, list) and not (part.isidentifier() and _is_class(entry)):
            raise UserError(
                f"model.path = {shown(source)}: {shown(part)} = {shown(entry)} in model_index.json, expected a part's "
                "name, library and class"
            )
        if isinstance(entry, list) and (folder / part).is_dir():
            for file in (folder / part).iterdir():
                if file.exists() and not file.is_dir():  # libraries open whatever has a known name
                    require_regular(file, f"model.path = {shown(source)}: {part}")
    checkpoint = Checkpoint(source, folder, index, variant)
    return replace(checkpoint, replaced={"vae": _fetch_vae(vae, checkpoint)}) if vae else checkpoint


def _fetch_vae(source: str, checkpoint: Checkpoint) -> Path:
    """The folder of an autoencoder that takes the place of a checkpoint's own.

    Args:
        source: a folder with its config.json, or with a folder vae/ that has one, or such a repository on the hub.
    Raises:
        UserError: there is none, or it is of another class or has latents of other channels.
        Failure: the hub does not answer.
    """
    what = f"model.vae = {shown(source)}"
    if not is_place(source):
        raise UserError(f"{what}: nothing has such a name")
    root = Path(source)
    if not root.exists() and HUB_ID.fullmatch(source):
        from huggingface_hub import snapshot_download

        root = _from_hub(what, source, lambda: snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    found = [folder for folder in (root, root / "vae") if (folder / "config.json").is_file()]
    if not found:
        raise UserError(f"{what}: no autoencoder in diffusers' layout (no config.json in {root} or its vae/)")
    for file in found[0].iterdir():
        if file.exists() and not file.is_dir():  # libraries open whatever has a known name
            require_regular(file, what)
    config = read_json(found[0] / "config.json", what)
    kind = checkpoint.kind("vae").__name__
    if config.get("_class_name") != kind:
        raise UserError(f"{what}: is a {shown(config.get('_class_name'))}, but {checkpoint.source} has a {kind}")
    channels, own = (c.get("latent_channels") for c in (config, checkpoint.config("vae")))
    if channels != own:
        raise UserError(f"{what}: has {shown(channels)} latent channels, but {checkpoint.source} has {own}")
    return found[0]


def _is_class(entry: list) -> bool:
    """Whether an entry of model_index.json has the form [library, class], or [null, null] for a part left out."""
    return len(entry) == 2 and (all(isinstance(x, str) for x in entry) or entry == [None, None])


def _download(source: str, revision: str, variant: str) -> Path:
    """Download a hub model into the hub's cache; returns its folder there."""
    from diffusers import DiffusionPipeline

    what = f"model.path = {source!r}" + (f", model.revision = {revision!r}" if revision else "")
    options = {"revision": revision or None, "variant": variant or None, "use_safetensors": True}
    return _from_hub(what, source, lambda: DiffusionPipeline.download(source, **options))


def _from_hub(what: str, source: str, download: Callable[[], str]) -> Path:
    """The folder of what is downloaded from the hub.

    Args:
        what: the setting, for messages.
        source: its value.
    Raises:
        UserError: the hub has no such model.
        Failure: it does not answer, or wants a licence accepted.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(download())
    except GatedRepoError:  # a subclass of RepositoryNotFoundError, so it comes first
        raise Failure(
            f"{what}: needs its licence accepted on the hub and a token (hf auth login, or HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{what}: no such revision on the hub") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what}: neither a folder here nor a model on the hub (a private one needs HF_TOKEN){near(source)}"
        ) from None
    except (OSError, ValueError) as error:
        raise Failure(
            f"{what}: no such folder, and the hub could not be reached for it; give a local diffusers folder, or try "
            f"again ({one_line(error)[:200]}){near(source)}"
        ) from None


def family_of(checkpoint: Checkpoint, pipelines: Mapping[str, str]) -> str:
    """Name of the family that a checkpoint's pipeline belongs to.

    Args:
        pipelines: family by diffusers pipeline.
    Raises:
        UserError: its pipeline is none of these.
    """
    if checkpoint.pipeline not in pipelines:
        raise UserError(
            f"model.path = {checkpoint.source!r}: a checkpoint for {checkpoint.pipeline}; expected one of "
            + ", ".join(pipelines)
        )
    return pipelines[checkpoint.pipeline]


def digest_of(paths: Sequence[Path]) -> str:
    """SHA-256, in hexadecimal, over names, sizes and contents of files.

    Of a file above 64 MiB its first and last MiB stand for the contents: hashing 24 GB of weights takes longer than
    reading the pairs that are encoded with them. Of a config.json only what changes the numbers counts, so that a
    checkpoint saved again by a newer library keeps its digest.
    """
    digest = hashlib.sha256()
    for path in paths:
        require_regular(path, str(path.parent))
        if path.name == "config.json":
            content = read_json(path, str(path.parent))
            kept = {k: v for k, v in content.items() if k not in PROVENANCE}
            digest.update(json.dumps(kept, sort_keys=True).encode())
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as stream:
            if size <= HASHED_WHOLE:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                digest.update(stream.read(2**20))
                stream.seek(-(2**20), 2)
                digest.update(stream.read())
    return digest.hexdigest()
