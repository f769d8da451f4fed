"""A trained model on the Hugging Face hub: its files and a model card, in one commit."""

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from workbench.common.errors import Failure, UserError, one_line, shown
from workbench.common.markdown import markdown_table
from workbench.common.version import __version__
from workbench.models import FAMILIES, HUB_ID
from workbench.models.lora import LORA_FILE
from workbench.models.safe_loading import read_json

CARD, INDEX = "README.md", "model_index.json"
#: What is uploaded of a part's folder; whatever else lies in it stays here.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
UNNAMED = "a folder that is not on the hub"  #: in a card's settings, for a place that says nothing to others
DENOISERS = tuple(sorted({family.DENOISER for family in FAMILIES.values()}))


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a trained model by their names on the hub: of LoRA weights one, else those of the model's parts.

    Raises:
        UserError: the folder is no trained model, or its model_index.json is none.
    """
    if (folder / LORA_FILE).is_file():
        found = [folder / LORA_FILE]
    else:
        found = [path for part in _parts(folder) for path in _files_in(folder / part)]
        index = folder / INDEX
        found += [index] if index.is_file() else []
    own = folder / CARD
    return {str(path.relative_to(folder)): path for path in [*found, *([own] if own.is_file() else [])]}


def _parts(folder: Path) -> list[str]:
    """The folders of a model's parts: those that its index names, or that of a denoiser alone."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, str(folder))
        # An identifier cannot lead out of the folder.
        parts = [name for name, entry in index.items() if isinstance(entry, list) and name.isidentifier()]
    else:
        parts = list(DENOISERS)
    there = [part for part in parts if (folder / part).is_dir()]
    if not there:
        raise UserError(f"{folder}: no trained model, as `python -m workbench.train --output` writes it")
    return there


def _files_in(part: Path) -> list[Path]:
    files = (path for path in sorted(part.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in FILES)]


def _variant(denoiser: Path) -> str:
    """The variant that a denoiser's weights are saved as, such as "fp16"; empty for the plain ones."""
    names = [path.name for path in denoiser.glob("diffusion_pytorch_model.*safetensors")]
    found = {re.sub(r"^diffusion_pytorch_model\.|(-\d+-of-\d+)?\.?safetensors$", "", name) for name in names}
    return found.pop() if len(found) == 1 else ""


def card(folder: Path, repository: str, base: str, settings: Mapping[str, Any]) -> str:
    """A model card: what was trained from what and how, and how it is loaded.

    Args:
        base: hub id or folder that training began with; empty where nobody says it.
        settings: of the run, by dotted name; empty where they are not known.
    Raises:
        UserError: as `files_of`, or the denoiser's config is none.
    """
    from huggingface_hub import ModelCardData

    lora = (folder / LORA_FILE).is_file()
    whole = not lora and (folder / INDEX).is_file()
    tags = ["text-to-image", "preference-optimisation", "diffusion-dpo", *(["lora"] if lora else [])]
    # A folder's path says nothing to others, and the hub takes ids alone.
    known = base if re.fullmatch(HUB_ID, base) and not Path(base).exists() else ""
    data = ModelCardData(base_model=known or None, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    kind = "LoRA weights" if lora else "A model" if whole else "A denoiser"
    missing = "" if known or whole else " `BASE` below stands for that model."
    vae = str(settings.get("model.vae", ""))
    decoded = vae if vae == UNNAMED else f"`{vae}`"
    other = f" It was trained with another autoencoder than that model's own: {decoded}." if vae else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repository.partition('/')[2]}",
        f"{kind} trained by preference optimisation{f' from `{known}`' if known else ''}, with the Diffusion DPO "
        f"Workbench {__version__}. The licence is that of the model that training began with and of the pairs."
        f"{other}{missing}",
        "```python\n" + "\n".join(_loading(folder, repository, known or "BASE", settings)) + "\n```",
    ]
    if settings:
        rows = [(f"`{name}`", f"`{value}`") for name, value in settings.items()]
        parts += ["## Settings", markdown_table(("setting", "value"), rows)]
    return "\n\n".join(parts) + "\n"


def _loading(folder: Path, repository: str, base: str, settings: Mapping[str, Any]) -> list[str]:
    """The lines of Python that load what is uploaded: a model, or a denoiser or LoRA weights in their base."""
    lora = (folder / LORA_FILE).is_file()
    denoiser = "" if lora else next((part for part in _parts(folder) if part in DENOISERS), "")
    variant = str(settings.get("model.variant", "")) or (_variant(folder / denoiser) if denoiser else "")
    options = f', variant="{variant}"' if variant else ""
    revised = f', revision="{settings["model.revision"]}"' if settings.get("model.revision") else ""
    # A model that is saved whole has its autoencoder with it.
    vae = str(settings.get("model.vae", ""))
    replaced, importing, with_vae = [], "", ""
    if vae and vae != UNNAMED:
        replaced = [f'vae = AutoModel.from_pretrained("{vae}")  # or with subfolder="vae", where it is a whole model']
        importing, with_vae = "AutoModel, ", ", vae=vae"
    if lora:
        return [
            f"from diffusers import {importing}DiffusionPipeline",
            "",
            *replaced,
            f'pipe = DiffusionPipeline.from_pretrained("{base}"{revised}{with_vae}{options})',
            f'pipe.load_lora_weights("{repository}")',
        ]
    if (folder / INDEX).is_file():
        loaded = f'pipe = DiffusionPipeline.from_pretrained("{repository}"{options})'
        return ["from diffusers import DiffusionPipeline", "", loaded]
    name = read_json(folder / denoiser / "config.json", f"{folder}: {denoiser}").get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{folder}: {denoiser}/config.json names no class ({shown(name)})")
    # In one precision: text encoders would otherwise come in the one that their own configs name.
    options += ", torch_dtype=torch.float32"
    return [
        "import torch",
        f"from diffusers import {importing}DiffusionPipeline, {name}",
        "",
        *replaced,
        f'{denoiser} = {name}.from_pretrained("{repository}", subfolder="{denoiser}"{options})',
        f'pipe = DiffusionPipeline.from_pretrained("{base}"{revised}, {denoiser}={denoiser}{with_vae}{options})',
    ]


def require_name(repository: str, what: str = "OWNER/NAME", close: str = "") -> None:
    """Check that a text can be a repository's name on the hub.

    Args:
        what: the argument that has it.
        close: a name that may be meant; empty = none is known.
    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(HUB_ID, repository):
        meant = f"; did you mean {close}?" if close else ""
        raise UserError(f"{what} {shown(repository)}: expected the name of a repository on the hub, OWNER/NAME{meant}")


def close_name(repository: str, known: Iterable[str]) -> str:
    """Of known repositories the one that is probably meant; empty for none, or where the name itself is known.

    Names of other digits are of other models, such as SD2.1 beside SD1.5, however alike they are.
    """
    names = {path.partition("/")[2]: path for path in known if "/" in path}
    if repository in names.values():
        return ""
    ours = repository.rpartition("/")[2]
    digits = re.findall(r"\d", ours)
    alike = [name for name in names if re.findall(r"\d", name) == digits]
    close = difflib.get_close_matches(ours, alike, 1, 0.85)
    return names[close[0]] if close else ""


def upload(folder: Path, repository: str, text: str, *, public: bool = False, update: bool = False) -> str:
    """Upload a trained model with its card; the folder's own README.md comes before the card.

    Args:
        repository: OWNER/NAME.
        text: the card.
        public: whether a repository that is made is public.
        update: add a commit to a repository that is there, in place of refusing it.
    Returns:
        The commit's address.
    Raises:
        UserError: no such name, no model in the folder, or the repository is there already.
        Failure: the hub refused, or did not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    require_name(repository)
    files: dict[str, Any] = {CARD: text.encode()} | files_of(folder)
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=update)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(
            repository, operations, commit_message="A model trained with the Diffusion DPO Workbench"
        )
    except Exception as error:  # the hub's client and its transport raise many kinds
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if status == 409 and not update:
            raise UserError(f"{repository}: is there already; --update adds a commit to it") from None
        hint = "; log in by `hf auth login` or HF_TOKEN with the right to write" if status in (401, 403) else ""
        raise Failure(f"{repository}: not uploaded ({one_line(error)[:200]}){hint}") from None
    return done.commit_url
