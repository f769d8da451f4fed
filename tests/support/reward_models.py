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
