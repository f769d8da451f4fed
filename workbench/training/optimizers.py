"""Optimizers and schedules of the learning rate, by name.

An optimizer is made from (parameters, lr, betas, weight_decay, epsilon). To add one: write it and name it below.
"""

import io
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from workbench.common.errors import UserError

log = logging.getLogger(__name__)
LEAST = 0.1  #: a smaller rate was meant for another optimizer than Prodigy


def adamw(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, epsilon: float
) -> Optimizer:
    """AdamW, fused: two float32 moments a weight."""
    # Fused: one kernel reads and writes each weight once; the step is limited by memory traffic (docs/performance.md).
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True)


def adamw_8bit(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, epsilon: float
) -> Optimizer:
    """AdamW whose moments take one byte each (Dettmers et al. 2022).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    kind = _of_bitsandbytes("AdamW8bit", "adamw_8bit")
    return kind(parameters, lr=lr, betas=betas, eps=epsilon, weight_decay=weight_decay)


def adamw_paged(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, epsilon: float
) -> Optimizer:
    """AdamW whose float32 moments move to the machine's memory where the GPU's does not suffice (Dettmers et al. 2023).

    By CUDA's unified memory, page by page: nothing is slower while all fits.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    kind = _of_bitsandbytes("PagedAdamW", "adamw_paged")
    return kind(parameters, lr=lr, betas=betas, eps=epsilon, weight_decay=weight_decay)


def _of_bitsandbytes(kind: str, name: str) -> Callable[..., Optimizer]:
    """An optimizer of bitsandbytes; UserError, which names the setting's value, where it is not installed."""
    try:
        import bitsandbytes.optim
    except ImportError:
        raise UserError(f"train.optimizer = {name!r}: needs bitsandbytes (pip install bitsandbytes)") from None
    return getattr(bitsandbytes.optim, kind)  # type: ignore[no-any-return]


def adafactor(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, epsilon: float
) -> Optimizer:
    """Adafactor: nearly no state (Shazeer and Stern 2018), at the given rate, unscaled; betas and epsilon are not used.

    transformers' version with its relative steps and parameter scaling off, as public Diffusion-DPO code uses it.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False
    )


def prodigy(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, epsilon: float
) -> Optimizer:
    """Prodigy, which finds the size of its steps itself (Mishchenko and Defazio 2023); four float32 states a weight.

    With bias correction and its safeguard for warm-up, as diffusers' scripts use it. The rate is a factor of what it
    finds and should be 1.

    Raises:
        UserError: prodigyopt is not installed.
    """
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise UserError("train.optimizer = 'prodigy': needs prodigyopt (pip install prodigyopt)") from None
    if lr < LEAST:
        log.warning("train.lr = %g is a factor of the rate that prodigy finds; it should be near 1", lr)
    with redirect_stdout(io.StringIO()):  # it prints a remark on weight decay
        return Prodigy(
            parameters, lr=lr, betas=betas, eps=epsilon, weight_decay=weight_decay, use_bias_correction=True,
            safeguard_warmup=True,
        )  # fmt: skip


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "adamw_paged": adamw_paged,
    "adafactor": adafactor,
    "prodigy": prodigy,
}


def schedule_of(name: str, optimizer: Optimizer, warmup: int, steps: int) -> LRScheduler:
    """A schedule of the learning rate.

    Args:
        name: "warmup", whose first of `warmup` steps has lr / (warmup + 1), or a name of diffusers' `get_scheduler`,
            whose warm-up begins with a step of rate 0.
        steps: after which a rate that falls has come to its end.
    """
    if name == "warmup":
        # LambdaLR counts from 0. The + 1 gives the first step a rate above 0, which diffusers' warm-ups do not.
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
    from diffusers.optimization import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
