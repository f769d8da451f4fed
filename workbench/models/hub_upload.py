"""A trained model on the Hugging Face hub: its files and a model card, in one commit."""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from workbench.common.errors import Failure, UserError, one_line
from workbench.common.markdown import markdown_table
from workbench.common.version import __version__
from workbench.models import HUB_ID
from workbench.models.backend import LORA_FILE

CARD = "README.md"
#: What is uploaded of a folder; whatever else lies in it stays here.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", CARD)


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a trained model by their names on the hub.

    Raises:
        UserError: the folder is no trained model.
    """
    if not any((folder / part).exists() for part in ("model_index.json", LORA_FILE, "unet", "transformer")):
        raise UserError(f"{folder}: no trained model, as `python -m workbench.train --output` writes it")
    inside = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path
        for name, path in inside.items()
        if any(fnmatch(path.name, pattern) for pattern in FILES) and not any(p.startswith(".") for p in name.split("/"))
    }


def card(folder: Path, repository: str, base: str, settings: Mapping[str, Any]) -> str:
    """A model card: what was trained from what and how, and how it is loaded.

    Args:
        base: hub id or folder that training began with; empty where nobody says it.
        settings: of the run, by dotted name; empty where they are not known.
    """
    from huggingface_hub import ModelCardData

    lora = (folder / LORA_FILE).is_file()
    tags = ["text-to-image", "preference-optimisation", "diffusion-dpo", *(["lora"] if lora else [])]
    # A folder's path says nothing to others, and the hub takes ids alone.
    known = base if re.fullmatch(HUB_ID, base) and not Path(base).exists() else ""
    data = ModelCardData(base_model=known or None, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    start = f'DiffusionPipeline.from_pretrained("{(known or "BASE") if lora else repository}")'
    lines = ["from diffusers import DiffusionPipeline", "", f"pipe = {start}"]
    lines += [f'pipe.load_lora_weights("{repository}")'] if lora else []
    kind = "LoRA weights" if lora else "A model"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repository.partition('/')[2]}",
        f"{kind} trained by preference optimisation{f' from `{known}`' if known else ''}, with the Diffusion DPO "
        f"Workbench {__version__}. The licence is that of the model that training began with and of the pairs.",
        "```python\n" + "\n".join(lines) + "\n```",
    ]
    if settings:
        rows = [(f"`{name}`", f"`{value}`") for name, value in settings.items()]
        parts += ["## Settings", markdown_table(("setting", "value"), rows)]
    return "\n\n".join(parts) + "\n"


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

    if not re.fullmatch(HUB_ID, repository):
        raise UserError(f"{repository}: expected OWNER/NAME")
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
