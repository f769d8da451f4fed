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
from workbench.training.config import LOCATED, SCORERS, Config, default_config
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


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as strangers may read them: of those that may name a file, only what comes with the workbench or a hub.

    A path says nothing elsewhere, but may tell a person's name. It is left out by its setting's name, since whether it
    is there says nothing of a path of another machine. `a/b` that is no folder here is taken for a hub id.
    """
    return {name: value for name, value in settings.items() if name not in (*LOCATED, SCORERS) or _is_public(value)}


def _is_public(value: Any) -> bool:
    """Whether a place is "embedded" or an id on the hub, perhaps with @REVISION and :SPLIT."""
    found = re.fullmatch(rf"({HUB_ID.pattern})(@[\w./-]+)?(:[\w.-]+)?", str(value))
    if value == "embedded" or found is None:
        return value == "embedded"
    with suppress(OSError):  # no name that a file could have
        # Hub ids seldom have the ending of a file of pairs or prompts, paths do.
        return not Path(found[1]).exists() and Path(found[1]).suffix not in (
            ".csv",
            ".json",
            ".jsonl",
            ".parquet",
            ".txt",
        )
    return False
