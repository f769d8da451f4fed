"""The reward models' published weights, read without pickle and given the names that transformers' classes use.

Sources of the layouts: open_clip's CLIP (HPSv2), BLIP and the head in the `image-reward` package (ImageReward), the
`improved-aesthetic-predictor` repository (LAION-Aesthetics).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench.common.errors import UserError, one_line
from workbench.models.safe_loading import check_declared, explained, read_json, require_finite

State = dict[str, Tensor]

#: Where the heads' linear layers lie between dropouts, which are off here; there is no activation among them.
HEAD_LAYERS = (0, 2, 4, 6, 7)
HEADS = 16  # attention heads of both towers of ViT-H-14 and of BLIP's ViT-L: the one number that shapes do not tell


def read_state(path: Path) -> State:
    """Tensors of a .safetensors file, or of a torch file that holds tensors and plain values only.

    A torch file may keep them under "state_dict", as HPSv2's does.

    Raises:
        UserError: damaged, or more than tensors in it: such a file could run code when it is read.
    """
    with explained(f"{path}: as weights it"):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError:
            raise UserError(f"{path}: holds more than tensors, which is not read; save its state dict alone") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    return {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def linear_head(state: Mapping[str, Tensor], prefix: str, path: Path) -> Any:
    """The linear layers `PREFIXlayers.N` as one module, from (N, in) to (N, 1).

    Raises:
        UserError: the layers are not those of the public linear heads, for instance one trained with activations.
    """
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.weight")
    layers = sorted(int(match[1]) for name in state if (match := pattern.fullmatch(name)))
    if tuple(layers) != HEAD_LAYERS:
        raise UserError(f"{path}: layers {layers or 'none'} under {prefix}layers; expected {list(HEAD_LAYERS)}")
    head = nn.Sequential()
    for layer in layers:
        weight, bias = (state[f"{prefix}layers.{layer}.{kind}"].float() for kind in ("weight", "bias"))
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        head.append(linear)
    require_finite(head, str(path))
    return head


def _renamed(state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> State:
    """The tensors under a prefix, their names rewritten by regular expressions in turn."""
    renamed = {}
    for name, value in state.items():
        if name.startswith(prefix):
            new = name.removeprefix(prefix)
            for old, replacement in names.items():
                new = re.sub(old, replacement, new)
            renamed[new] = value.float()
    return renamed


def _load(model: nn.Module, state: State, path: Path) -> Any:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: not the expected weights ({' '.join(str(error).split())[:200]})") from None
    require_finite(model, str(path))
    return model


def _depth(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are, each with a tensor at least; its names may say otherwise."""
    layers = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    if layers != set(range(len(layers))):
        raise KeyError(f"layer {next(i for i in range(len(layers)) if i not in layers)} of {pattern}")
    return len(layers)


# --- open_clip -----------------------------------------------------------------------------------------------

_CLIP_LAYER = {
    r"^transformer\.resblocks\.": "encoder.layers.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
_CLIP_VISION = _CLIP_LAYER | {
    r"^conv1\.": "embeddings.patch_embedding.",
    r"^class_embedding$": "embeddings.class_embedding",
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^ln_pre\.": "pre_layrnorm.",
    r"^ln_post\.": "post_layernorm.",
}
_CLIP_TEXT = _CLIP_LAYER | {
    r"^token_embedding\.": "embeddings.token_embedding.",
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^ln_final\.": "final_layer_norm.",
}


def _split_attention(state: State) -> State:
    """open_clip's joint projection of queries, keys and values, as three."""
    split: State = {}
    for name, value in state.items():
        joint = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        parts = zip("qkv", value.chunk(3), strict=True) if joint else []
        split |= {f"{joint[1]}.self_attn.{x}_proj.{joint[2]}": part for x, part in parts} if joint else {name: value}
    return split


def clip_from_open_clip(path: Path, eos_token_id: int) -> Any:
    """transformers' CLIPModel with the weights of an open_clip ViT-H-14 (GELU, 16 heads in both towers).

    Raises:
        UserError: other weights.
    """
    from transformers import CLIPConfig, CLIPModel

    state = read_state(path)
    try:
        patches, tokens = state["visual.conv1.weight"], state["token_embedding.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        # One position is the class token's.
        grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        text = {
            "vocab_size": tokens.shape[0],
            "hidden_size": tokens.shape[1],
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _depth(state, r"transformer\.resblocks\.(\d+)"),
            "max_position_embeddings": len(state["positional_embedding"]),
            "eos_token_id": eos_token_id,
            # CLIP's vocabulary ends with these two. open_clip pads with 0, unlike OpenAI's tokenizer.
            "bos_token_id": eos_token_id - 1,
            "pad_token_id": 0,
        }
        vision = {
            "hidden_size": width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _depth(state, r"visual\.transformer\.resblocks\.(\d+)"),
            "image_size": grid * patch,
            "patch_size": patch,
        }
        joint = state["text_projection"].shape[1]
    except KeyError as error:
        raise UserError(f"{path}: no {error} in it; expected an open_clip ViT-H-14 such as HPSv2's") from None
    shared = {"num_attention_heads": HEADS, "hidden_act": "gelu", "projection_dim": joint}
    config = CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=joint)
    parts = {
        "vision_model": _renamed({k: v for k, v in state.items() if k != "visual.proj"}, "visual.", _CLIP_VISION),
        "text_model": _renamed(
            {k: v for k, v in state.items() if not k.startswith(("visual.", "text_projection", "logit", "attn_mask"))},
            "",
            _CLIP_TEXT,
        ),
    }
    named = {f"{part}.{name}": value for part, own in parts.items() for name, value in _split_attention(own).items()}
    # open_clip multiplies by x @ W; a Linear layer holds the transpose.
    named["visual_projection.weight"] = state["visual.proj"].float().T
    named["text_projection.weight"] = state["text_projection"].float().T
    named["logit_scale"] = state["logit_scale"].float()
    return _load(CLIPModel(config), named, path)


# --- BLIP ----------------------------------------------------------------------------------------------------

#: What the text encoder takes from med_config.json; the rest is BLIP's own.
_MED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id",
)  # fmt: skip
_BLIP_VISION = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"^norm\.": "post_layernorm.",
}


def blip_from_imagereward(path: Path, config: Path) -> tuple[Any, Any, Any]:
    """ImageReward's three parts: image encoder, text encoder with cross-attention, linear head.

    Args:
        config: its med_config.json, which describes the text encoder.
    Raises:
        UserError: other weights.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    state = read_state(path)
    try:
        med = read_json(config, str(config.parent))
        patches = state["blip.visual_encoder.patch_embed.proj.weight"]
        grid = round((state["blip.visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=patches.shape[0],
                intermediate_size=state["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_depth(state, r"blip\.visual_encoder\.blocks\.(\d+)"),
                num_attention_heads=HEADS,
                image_size=grid * patches.shape[-1],
                patch_size=patches.shape[-1],
                layer_norm_eps=1e-6,  # as BLIP's own encoder; transformers' default is another
            )
        )
        # Before the model is built: this config comes from the same stranger as the weights.
        check_declared(med, {name: x.shape for name, x in state.items()}, str(config))
        text = BlipTextModel(
            BlipTextConfig(
                **{key: med[key] for key in _MED},
                encoder_hidden_size=patches.shape[0],
                bos_token_id=None,
                eos_token_id=None,
                sep_token_id=None,
            ),
            add_pooling_layer=False,
        )
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not ImageReward's weights with its med_config.json ({one_line(error)})") from None
    _load(vision, _renamed(state, "blip.visual_encoder.", _BLIP_VISION), path)
    words = _renamed(state, "blip.text_encoder.", {})
    # position_ids is a buffer that transformers makes itself and does not store.
    _load(text, {name: value for name, value in words.items() if not name.endswith("position_ids")}, path)
    return vision, text, linear_head(state, "mlp.", path)
