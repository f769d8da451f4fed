"""Layers of denoisers, changed so that trained and fixed models compute alike: to the bit, in half precision, fast.

A hard copy of the policy into the reference must leave a logit of exactly 0, whichever of the two requires gradients
and however their weights are stored.
"""

import torch
from torch import Tensor, nn


def prepare(denoiser: nn.Module) -> nn.Module:
    """Make linear layers take contiguous inputs, and norms compute in their input's precision; in place.

    May be called again, after `adapt` has added layers.

    Returns:
        The denoiser itself.
    """
    from workbench.models.norms import NORMS  # here: it imports diffusers, which a denoiser has been made by

    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear) and _contiguous not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_contiguous)
        elif type(layer) in NORMS:
            layer.__class__ = NORMS[type(layer)]  # the parameters keep their names
    return denoiser


def _contiguous(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook of a linear layer: its input, laid out in memory without gaps.

    For any other layout torch chooses its matrix product by whether the weight requires a gradient, so that the policy
    and a reference with the same weights may differ in the last bit (SDXL, SD3, Sana's adapters).
    """
    return (inputs[0].contiguous(), *inputs[1:])


def store_half(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights of linear and convolution layers to a precision, in place; for models that are not trained.

    These are the layers that autocast casts on every call. All others, such as norms and learned embeddings, stay
    float32: a model stored in half precision throughout differs from its float32 twin where a layer computes in
    float32, and the logit after a hard copy would not be exactly 0.

    Returns:
        The denoiser itself.
    """
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(dtype)
    return denoiser
