"""Folders of reward models that are broken, or that somebody made to do harm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.bad_checkpoints import Harm, cut, disguised, edited, pickled, reweighed, written
from tests.support.reward_models import MED, head_state, imagereward_state, open_clip_state
from workbench.models import ASSETS

NAN = float("nan")


def _clip(*changes: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    """A CLIP after some changes."""

    def make(folder: Path, clip: Path) -> None:
        shutil.copytree(clip, folder, dirs_exist_ok=True)
        for change in changes:
            change(folder)

    return make


def _beside(file: str, content: Callable[[Path], Any], about: Any = None) -> Callable[[Path, Path], None]:
    """One torch file, with a CLIP and its tokenizer beside it, or a med_config.json."""

    def make(folder: Path, clip: Path) -> None:
        folder.mkdir()
        for name in ("clip", "tokenizer"):
            (folder / name).symlink_to(clip)
        torch.save(content(folder), folder / file)
        if about is not None:
            (folder / "med_config.json").write_text(about if isinstance(about, str) else json.dumps(about))

    return make


def _words(clip: Path) -> int:
    return len(json.loads((clip / "tokenizer.json").read_text())["model"]["vocab"])


def _open_clip(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], None]:
    """HPSv2's file with other tensors."""

    def make(folder: Path, clip: Path) -> None:
        state = open_clip_state(_words(clip))
        changed = change(state)
        _beside("HPS_v2_compressed.pt", lambda _: {"state_dict": changed})(folder, clip)

    return make


def _imagereward(change: Callable[[dict[str, torch.Tensor]], Any], **about: Any) -> Callable[[Path, Path], None]:
    """ImageReward's files with other tensors, or another description."""

    def make(folder: Path, clip: Path) -> None:
        _beside("ImageReward.pt", lambda _: change(imagereward_state()), MED | about)(folder, clip)
        (folder / "tokenizer").unlink()
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfox")

    return make


def _reward(*changes: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    """The small model's reward after some changes."""

    def make(folder: Path, clip: Path) -> None:
        for part in ("scorer", "critic"):
            shutil.copytree(ASSETS / part, folder / part)
        for change in changes:
            change(folder)

    return make


def _first(tensors: dict[str, torch.Tensor], value: float) -> None:
    """The first number of the first weight becomes another."""
    tensors[next(name for name in sorted(tensors) if name.endswith(".weight"))].view(-1)[0] = value


def _code(folder: Path) -> None:
    """A model with code of its own."""
    (folder / "scorer" / "evil.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w')\nclass Evil: ...\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    edited("scorer/config.json", model_type="evil", auto_map=auto)(folder)


WEIGHTS, HPS = "model.safetensors", "HPS_v2_compressed.pt"
LAYER = "transformer.resblocks.{}.x"
#: Scorer -> what is wrong -> how it is made, and what the line must name.
BROKEN: dict[str, dict[str, tuple[Callable[[Path, Path], Any], str]]] = {
    "clip": {
        "half the weights": (_clip(cut(WEIGHTS, 5000)), "model.safetensors cannot be loaded"),
        "a pickle called safetensors": (_clip(disguised(WEIGHTS)), "model.safetensors cannot be loaded"),
        "only a pickle": (_clip(pickled("pytorch_model.bin")), "has config.json and *.safetensors"),
        "a weight that is no number": (_clip(reweighed(WEIGHTS, lambda t: _first(t, NAN))), "not finite"),
        "a weight too few": (_clip(reweighed(WEIGHTS, lambda t: t.pop("visual_projection.weight"))), "is not there"),
        "a config that is no JSON": (_clip(cut("config.json", 40)), "config.json cannot be read"),
        "a config of nothing": (_clip(written("config.json", "{}")), "the CLIP model"),
        "layers without end": (
            _clip(edited("config.json", text_config={"num_hidden_layers": 10**9})),
            "num_hidden_layers = 1000000000",
        ),
        "images without end": (
            _clip(edited("config.json", vision_config={"image_size": 10**9})),
            "image_size = 1000000000",
        ),
        "a tokenizer that is no JSON": (_clip(cut("tokenizer.json", 300)), "the tokenizer cannot be loaded"),
        "a tokenizer that is a list": (_clip(written("tokenizer.json", "[]")), "the tokenizer cannot be loaded"),
    },
    "hpsv2": {
        "a pickle": (_beside(HPS, lambda folder: {"a": Harm(folder.parent)}), "holds more than tensors"),
        "a list": (_beside(HPS, lambda folder: [1, 2]), "no 'visual.conv1.weight' in it"),
        "a number": (_beside(HPS, lambda folder: 3), "no 'visual.conv1.weight' in it"),
        "a weight that is no number": (_open_clip(lambda s: s | {"visual.proj": s["visual.proj"] * NAN}), "not finite"),
        "a layer without end": (_open_clip(lambda s: s | {LAYER.format(10**9): torch.zeros(1)}), "layer 2 of"),
        "a layer of 5000 digits": (_open_clip(lambda s: s | {LAYER.format("9" * 5000): torch.zeros(1)}), HPS),
        "a flat weight": (_open_clip(lambda s: s | {"token_embedding.weight": torch.zeros(())}), HPS),
        "a weight turned": (_open_clip(lambda s: s | {"text_projection": s["text_projection"].T}), HPS),
    },
    "aesthetic": {
        "a pickle": (_beside("a.pth", lambda folder: {"layers.0.weight": Harm(folder.parent)}), "more than tensors"),
        "a weight that is no number": (
            _beside("a.pth", lambda folder: head_state() | {"layers.0.bias": torch.full((12,), NAN)}),
            "a.pth: 0.bias has values that are not finite",
        ),
        "a bias too few": (
            _beside("a.pth", lambda folder: {k: x for k, x in head_state().items() if k != "layers.2.bias"}),
            "a.pth",
        ),
        "a flat weight": (_beside("a.pth", lambda folder: head_state() | {"layers.2.weight": torch.zeros(3)}), "a.pth"),
    },
    "imagereward": {
        "a pickle": (_imagereward(lambda s: s | {"harm": Harm(Path())}), "holds more than tensors"),
        "layers without end": (_imagereward(dict, num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
        "words without end": (_imagereward(dict, vocab_size=10**12), "vocab_size = 1000000000000"),
        "a word for the width": (_imagereward(dict, hidden_size="wide"), "ImageReward.pt"),
        "no description": (_beside("ImageReward.pt", lambda _: imagereward_state(), "[]"), "med_config.json holds []"),
    },
    "reward": {
        "code of its own": (_reward(_code), "cannot be loaded"),
        "half the weights": (_reward(cut(f"scorer/{WEIGHTS}", 5000)), "model.safetensors cannot be loaded"),
        "a pickle called safetensors": (_reward(disguised(f"critic/{WEIGHTS}")), "model.safetensors cannot be loaded"),
        "a weight that is no number": (_reward(reweighed(f"critic/{WEIGHTS}", lambda t: _first(t, NAN))), "critic: "),
        "layers without end": (_reward(edited("scorer/config.json", num_hidden_layers=10**9)), "num_hidden_layers ="),
    },
}
