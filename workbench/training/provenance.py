"""What a run says of itself as it begins: what it is made with, what it learns from, what differs from the defaults."""

import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from typing import Any

from workbench.common.markdown import markdown_table
from workbench.common.paths import checkout
from workbench.common.version import __version__
from workbench.models import HUB_ID
from workbench.training.config import Config, default_config
from workbench.training.experiment_file import LOCATED, SCORERS_SETTING
from workbench.training.preparation import Prepared


def provenance() -> dict[str, str]:
    """Tags that say what a run was made with: versions and, where it runs from a checkout, the git commit."""
    packages = ("torch", "diffusers", "transformers", "optuna", "mlflow")
    tags = {"version.workbench": __version__}
    for name in packages:
        with suppress(PackageNotFoundError):  # training alone needs neither Optuna nor MLflow
            tags[f"version.{name}"] = version(name)
    root = checkout()
    if root is None or which("git") is None:  # installed, git would speak of whatever repository is around it
        return tags
    for tag, command in (("commit", ["rev-parse", "HEAD"]), ("changes", ["status", "--porcelain", "-uno"])):
        found = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        if found.returncode == 0:
            tags[f"git.{tag}"] = found.stdout.strip()[:2000] or "none"
    return tags


def datasets(ready: Prepared) -> dict[str, tuple[str, dict[str, int]]]:
    """Digest and row counts of the training and validation pairs."""
    return {
        "train": (ready.train.digest, ready.train.counts),
        "validation": (ready.validation.digest, ready.validation.counts),
    }


def describe(config: Config, arm: str = "") -> str:
    """A run's description in Markdown: what differs from the defaults."""
    defaults = default_config().flat()
    changed = [(f"`{k}`", v, defaults.get(k)) for k, v in config.flat().items() if defaults.get(k) != v]
    head = f"Arm **{arm}** of the study.\n\n" if arm else ""
    return head + (markdown_table(("setting", "here", "default"), changed) if changed else "All settings are defaults.")


#: Those of LOCATED that may be an id on the hub, and the values that name what comes with the workbench.
ON_HUB, SHIPPED = ("model.path", "model.vae", "data.train", "data.validation"), ("embedded", "validation")


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as strangers may read them: of those that may name a file, only what comes with the workbench or a hub.

    A path says nothing elsewhere, but may tell a person's name. It is left out by its setting's name, since whether it
    is there says nothing of a path of another machine. `a/b` that is no folder here is taken for a hub id.
    """
    places = {name: str(value) for name, value in settings.items() if name in (*LOCATED, SCORERS_SETTING)}
    kept = {name for name, value in places.items() if value in SHIPPED or (name in ON_HUB and _is_hub_id(value))}
    return {name: value for name, value in settings.items() if name not in places or name in kept}


def _is_hub_id(value: str) -> bool:
    """Whether a place is an id on the hub, perhaps with @REVISION and :SPLIT, and nothing on this machine."""
    found = re.fullmatch(rf"({HUB_ID.pattern})(@[\w./-]+)?(:[\w.-]+)?", value)
    # 96: the hub's limit. Ids seldom have the ending of a file of pairs, paths do.
    if found is None or len(found[1]) > 96 or Path(found[1]).suffix in (".csv", ".json", ".jsonl", ".parquet"):
        return False
    return not Path(found[1]).exists()
