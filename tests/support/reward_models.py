"""Tiny random reward models in the layouts of the published ones."""

from pathlib import Path

import torch

from tests.support.helpers import random_text_encoder

EDGE, PATCH, JOINT, WIDE = 16, 8, 24, 32  # image, patch, joint embedding, towers


def save_clip(folder: Path):
    """A random CLIP in transformers' layout with a tokenizer, saved.

    Returns:
        folder, model, tokenizer.
    """
    from transformers import CLIPConfig, CLIPModel

    tokenizer, text = random_text_encoder()
    torch.manual_seed(0)
    words = text.config.to_dict() | {"projection_dim": JOINT, "hidden_size": WIDE, "intermediate_size": 40}
    sees = {"hidden_size": WIDE, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sees |= {"image_size": EDGE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=words, vision_config=sees, projection_dim=JOINT)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.logit_scale.data.fill_(3.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


#: Layer -> its numbers out and in, of LAION's linear head.
SIZES = {0: (12, JOINT), 2: (10, 12), 4: (8, 10), 6: (6, 8), 7: (1, 6)}


def head_state(prefix="", into=JOINT):
    shapes = {f"{prefix}layers.{i}.weight": (out, into if i == 0 else n) for i, (out, n) in SIZES.items()}
    return random_state(shapes | {f"{prefix}layers.{i}.bias": (out,) for i, (out, _) in SIZES.items()}, seed=1)


TEXT, LINES = 24, 40  # width and vocabulary of the text encoder
MED = {
    "vocab_size": LINES, "hidden_size": TEXT, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0,
    "type_vocab_size": 2, "add_cross_attention": True, "encoder_width": 768,
}  # fmt: skip


def imagereward_state():
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {f"{v}cls_token": (1, 1, WIDE), f"{v}pos_embed": (1, 1 + (EDGE // PATCH) ** 2, WIDE)}
    shapes |= {f"{v}patch_embed.proj.weight": (WIDE, 3, PATCH, PATCH), f"{v}patch_embed.proj.bias": (WIDE,)}

    def linear(name, out, into):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes |= norm(f"{v}norm", WIDE)
    for i in range(2):
        b = f"{v}blocks.{i}."
        shapes |= norm(f"{b}norm1", WIDE) | norm(f"{b}norm2", WIDE) | linear(f"{b}attn.qkv", 3 * WIDE, WIDE)
        shapes |= (
            linear(f"{b}attn.proj", WIDE, WIDE) | linear(f"{b}mlp.fc1", 40, WIDE) | linear(f"{b}mlp.fc2", WIDE, 40)
        )
        b = f"{t}encoder.layer.{i}."
        for kind, into in (("attention", TEXT), ("crossattention", WIDE)):
            shapes |= linear(f"{b}{kind}.self.query", TEXT, TEXT) | linear(f"{b}{kind}.self.key", TEXT, into)
            shapes |= linear(f"{b}{kind}.self.value", TEXT, into) | linear(f"{b}{kind}.output.dense", TEXT, TEXT)
            shapes |= norm(f"{b}{kind}.output.LayerNorm", TEXT)
        shapes |= linear(f"{b}intermediate.dense", 36, TEXT) | linear(f"{b}output.dense", TEXT, 36)
        shapes |= norm(f"{b}output.LayerNorm", TEXT)
    shapes |= {f"{t}embeddings.word_embeddings.weight": (LINES, TEXT)}
    shapes |= {f"{t}embeddings.position_embeddings.weight": (64, TEXT)} | norm(f"{t}embeddings.LayerNorm", TEXT)
    shapes |= linear("blip.vision_proj", 8, WIDE)  # there, and not used
    state = random_state(shapes) | head_state("mlp.", into=TEXT)
    return state | {f"{t}embeddings.position_ids": torch.arange(64)[None]}


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=generator) + (1 if name.endswith(("norm", "g.weight")) else 0)
        for name, shape in shapes.items()
    }


def block(prefix, width):
    shapes = {f"{prefix}.attn.in_proj_weight": (3 * width, width), f"{prefix}.attn.in_proj_bias": (3 * width,)}
    shapes |= {f"{prefix}.attn.out_proj.weight": (width, width), f"{prefix}.attn.out_proj.bias": (width,)}
    shapes |= {f"{prefix}.ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    shapes |= {f"{prefix}.mlp.c_fc.weight": (48, width), f"{prefix}.mlp.c_fc.bias": (48,)}
    return shapes | {f"{prefix}.mlp.c_proj.weight": (width, 48), f"{prefix}.mlp.c_proj.bias": (width,)}


def open_clip_state(words):
    shapes = {"visual.class_embedding": (WIDE,), "visual.positional_embedding": (1 + (EDGE // PATCH) ** 2, WIDE)}
    shapes |= {"visual.conv1.weight": (WIDE, 3, PATCH, PATCH), "visual.proj": (WIDE, JOINT)}
    shapes |= {"text_projection": (WIDE, JOINT), "token_embedding.weight": (words, WIDE)}
    shapes |= {"positional_embedding": (16, WIDE), "logit_scale": ()}
    shapes |= {f"{n}.{k}": (WIDE,) for n in ("visual.ln_pre", "visual.ln_post", "ln_final") for k in ("weight", "bias")}
    for tower in ("visual.transformer", "transformer"):
        for layer in range(2):
            shapes |= block(f"{tower}.resblocks.{layer}", WIDE)
    return random_state(shapes)
