"""Optimizers by name, each made from (parameters, lr, betas, weight_decay). To add one: write it and name it below."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from workbench.common.errors import UserError


def adamw(parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """AdamW, fused: two float32 moments a weight."""
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def adamw_8bit(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """AdamW whose moments take one byte each (Dettmers et al. 2022).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("train.optimizer = 'adamw_8bit': needs bitsandbytes (pip install bitsandbytes)") from None
    return AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def adafactor(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """Adafactor: nearly no state (Shazeer and Stern 2018), at the given rate, unscaled; betas are not used.

    transformers' version with its relative steps and parameter scaling off, as public Diffusion-DPO code uses it.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False
    )


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": adamw, "adamw_8bit": adamw_8bit, "adafactor": adafactor}
