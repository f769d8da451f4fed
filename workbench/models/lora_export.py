"""LoRA weights in the layouts of other programs, which must read the same scale in them.

An update is alpha / rank times B A. diffusers stores alpha in the file's metadata, which other programs do not read:
they take alpha for equal to the rank, and draw with a stronger or weaker update. So here alpha is either a tensor
beside each layer's factors, as kohya's sd-scripts write it and ComfyUI, A1111 and diffusers read it, or part of B.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.common.errors import UserError, shown
from workbench.common.files import in_place
from workbench.models.lora import LORA_FILE
from workbench.models.safe_loading import explained, read_shapes

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
#: Key of diffusers' in a file's metadata, under which peft's configuration lies as JSON.
METADATA = "lora_adapter_metadata"

Weights = dict[str, Tensor]


def export(source: Path, target: Path, layout: str) -> None:
    """Write LoRA weights in another layout.

    Args:
        source: a file that `Backend.save` wrote, or a folder with one.
        target: a safetensors file that does not exist.
        layout: a key of LAYOUTS.
    Raises:
        UserError: the source is no such file, the layout has no names for it, or the target exists.
    """
    if target.suffix != ".safetensors" or target.exists():
        problem = "exists already" if target.exists() else "its name must end in .safetensors"
        raise UserError(f"{target}: {problem}")
    weights, part, alpha = read(source / LORA_FILE if source.is_dir() else source)
    rank = len(next(value for name, value in weights.items() if name.endswith(DOWN)))
    # safetensors refuses views that are not contiguous.
    tensors = {name: value.contiguous() for name, value in LAYOUTS[layout](weights, part, alpha).items()}
    about = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
    target.parent.mkdir(parents=True, exist_ok=True)
    # The folded layout has the scale inside of B, so a reader must find alpha equal to the rank.
    with in_place(target) as partial:
        save_file(tensors, partial, metadata=about | {"ss_network_alpha": f"{alpha if layout == 'kohya' else rank:g}"})


def read(path: Path) -> tuple[Weights, str, float]:
    """LoRA weights as diffusers writes them.

    Returns:
        The factors by `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, which part they adapt ("unet" or
        "transformer"), and alpha, which is the rank where the file does not say it.
    Raises:
        UserError: not such a file.
    """
    read_shapes([path], str(path.parent))  # whether it can be read at all
    with explained(f"{path}: as LoRA weights it"), safe_open(path, "pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
        about = json.loads((stream.metadata() or {}).get(METADATA, "{}"))
    parts = {name.partition(".")[0] for name in tensors}
    part = next(iter(parts), "")
    weights = {name.removeprefix(f"{part}."): value for name, value in tensors.items()}
    layers = {name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)}
    if not layers or len(parts) > 1 or weights.keys() != {layer + end for layer in layers for end in (DOWN, UP)}:
        raise UserError(f"{path}: expected LoRA weights of one network, as train.keep and `train --output` write them")
    ranks = {len(weights[layer + DOWN]) for layer in layers}
    alpha = about.get(f"{part}.lora_alpha", next(iter(ranks)))
    if len(ranks) > 1 or about.get(f"{part}.alpha_pattern") or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(f"{path}: its layers have ranks {sorted(ranks)}, alpha {shown(alpha)}; expected one of each")
    return weights, part, float(alpha)


def _kohya(weights: Weights, part: str, alpha: float) -> Weights:
    """The layout of sd-scripts: `lora_unet_LAYER.lora_down.weight`, `.lora_up.weight` and `.alpha`."""
    if part != "unet":
        raise UserError(f"--format kohya: has names for UNets (SD1.x, SD2.x, SDXL), not for a {part}; take diffusers")
    found: dict[str, Any] = {}
    for name, value in weights.items():
        layer = name.removesuffix(DOWN).removesuffix(UP)
        key = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{key}.{'lora_down' if name.endswith(DOWN) else 'lora_up'}.weight"] = value
        found[f"{key}.alpha"] = torch.tensor(alpha)
    return found


def _folded(weights: Weights, part: str, alpha: float) -> Weights:
    """diffusers' own names, B times alpha / rank: who knows of no alpha, and takes the rank for it, reads the same."""
    factor = {name.removesuffix(UP): alpha / value.shape[1] for name, value in weights.items() if name.endswith(UP)}
    return {
        f"{part}.{name}": value * factor[name.removesuffix(UP)] if name.endswith(UP) else value
        for name, value in weights.items()
    }


LAYOUTS: Mapping[str, Callable[[Weights, str, float], Weights]] = {"kohya": _kohya, "diffusers": _folded}
