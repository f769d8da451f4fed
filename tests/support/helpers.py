"""Small things that many tests need: random pictures and pairs, commands as a user runs them."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def random_text_encoder():
    """The small model's tokenizer, and an untrained text encoder for it, half as wide; the same in every session."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from workbench.models import ASSETS

    torch.manual_seed(0)
    smaller = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64}
    config = CLIPTextConfig.from_pretrained(ASSETS / "model" / "text_encoder", **smaller)
    config.dtype = None
    return CLIPTokenizer.from_pretrained(ASSETS / "model" / "tokenizer"), CLIPTextModel(config).float()


def picture(rng: np.random.Generator, kind: str = "PNG") -> bytes:
    """A random image's bytes."""
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def pair_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows in Pick-a-Pic's columns, labels alternating."""
    from workbench.models.small.prompts import split

    rng, captions = np.random.default_rng(seed), [str(p) for p in split()["train"]]
    return [
        {
            "caption": captions[i % len(captions)],
            "jpg_0": picture(rng),
            "jpg_1": picture(rng),
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
            "has_label": True,
        }
        for i in range(count)
    ]


def workbench(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run `python -m workbench.ARGUMENTS` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def as_toml(settings: dict) -> str:
    """Settings as an experiment file."""
    tables: dict[str, list[str]] = {}
    for name, value in settings.items():
        section, key = name.split(".")
        tables.setdefault(section, []).append(f"{key} = {value!r}".replace("'", '"'))
    return "\n".join(f"[{section}]\n" + "\n".join(lines) for section, lines in tables.items())


def overrides(settings: dict) -> list[str]:
    """Settings as --set options."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
