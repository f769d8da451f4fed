"""Checks that the parts of a checkpoint are valid and fit together, made before anything runs with them.

Each raises a UserError of one line. Without them the same faults surface hours later, as a shape error deep in a
library or as training on a schedule that makes no sense.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from workbench.common.errors import UserError, shown
from workbench.models.checkpoints import Checkpoint
from workbench.models.safe_loading import explained


def load_scheduler(checkpoint: Checkpoint, kind: Any, corrected: Mapping[str, Any] | None = None) -> Any:
    """A checkpoint's scheduler.

    Args:
        kind: diffusers class that it is read as; what its config lacks, because it was written by another class, has
            that class's defaults.
        corrected: values that the family's models need, whatever the config says.
    Raises:
        UserError: its config holds what that class cannot work with.
    """
    # Before the constructor, which allocates tables of this length.
    checkpoint.number("scheduler", "num_train_timesteps", 1000, 2, 100_000, "scheduler_config.json")
    with explained(f"{checkpoint.name}: scheduler"):
        scheduler = kind.from_pretrained(checkpoint.folder, subfolder="scheduler", local_files_only=True)
        scheduler.register_to_config(**corrected or {})
        shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}  # diffusers insists on it
        # On a copy: the families read the noise levels of training, which set_timesteps overwrites.
        copy.deepcopy(scheduler).set_timesteps(2, **shift)  # reads the settings that the constructor only stores
    return scheduler


def require_noise(checkpoint: Checkpoint, abar: Tensor) -> None:
    """Raise UserError unless noise never shrinks along the timestep axis.

    Args:
        abar: signal's share of the variance at each t, shape (T,).
    """
    # Exactly 0 is allowed: a flow ends in pure noise.
    if not (((abar >= 0) & (abar < 1)).all() and (abar.diff() <= 0).all()):
        raise UserError(f"{checkpoint.name}: scheduler describes no noise that grows with the timesteps")


def require_sizes(checkpoint: Checkpoint, denoiser: str, channels: int, packing: int) -> None:
    """Raise UserError where the configs of autoencoder and denoiser contradict each other.

    Args:
        denoiser: name of that part, "unet" or "transformer".
        channels: of the autoencoder's latents.
        packing: edge of the patch of latents that becomes one input of the denoiser.
    """
    number = checkpoint.number
    for key in ("in_channels", "out_channels"):
        number("vae", key, 3, 3, 3)
    number("vae", "scaling_factor", 0.18215, 1e-6, 1e6)
    if checkpoint.config("vae").get("shift_factor") is not None:
        number("vae", "shift_factor", 0.0, -1e6, 1e6)
    expected = channels * packing**2
    takes = number(denoiser, "in_channels", expected, 1, 4096)
    if takes != expected:
        raise UserError(
            f"{checkpoint.name}: {denoiser} has in_channels = {takes}, expected the vae's "
            f"{channels}{f' x {packing} x {packing}' if packing > 1 else ''} (models that fill in parts of an image "
            "take more)"
        )


def halvings(checkpoint: Checkpoint, part: str, key: str = "block_out_channels") -> int:
    """How many times a convolutional part halves the resolution of its input: once a block but the last.

    Args:
        key: of its config that lists the blocks' channels.
    Raises:
        UserError: its config lists no such blocks.
    """
    # By default one block, which halves nothing: transformers have no such list.
    blocks = checkpoint.config(part).get(key, [0])
    if not isinstance(blocks, list) or not 0 < len(blocks) <= 8:
        raise UserError(f"{checkpoint.name}: {part} has {key} = {shown(blocks)}, expected 1 to 8 of them")
    return len(blocks) - 1


def require_tokens(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> None:
    """Raise UserError where a tokenizer produces ids or lengths that its text encoder does not take.

    Args:
        parts: tokenizers and text encoders, by name.
    """
    for name, encoder in parts.items():
        if not name.startswith("text_encoder"):
            continue
        tokenizer, config = parts.get(name.replace("text_encoder", "tokenizer")), encoder.config.get_text_config()
        if tokenizer is None:
            raise UserError(f"{checkpoint.name}: {name} has no tokenizer")
        if len(tokenizer) > config.vocab_size:
            raise UserError(f"{checkpoint.name}: {name} has {config.vocab_size} tokens, its tokenizer {len(tokenizer)}")
        # Rotary positions have no end, and the pipelines cut the text; only embedded ones run out.
        embedded = not getattr(config, "rope_parameters", None)
        longest = getattr(config, "max_position_embeddings", None) if embedded else None
        length = tokenizer.model_max_length
        if not isinstance(length, int) or length < 2 or (longest is not None and length > longest):
            raise UserError(f"{checkpoint.name}: {name} takes {longest} tokens, its tokenizer makes {shown(length)}")
