"""Layers of denoisers, changed so that trained and fixed models compute alike: to the bit, in half precision, fast.

A hard copy of the policy into the reference must leave a logit of exactly 0, whichever of the two requires gradients
and however their weights are stored.
"""

import torch
from torch import Tensor, nn


def prepare(denoiser: nn.Module) -> nn.Module:
    """Make linear layers take contiguous inputs, and RMS norms fused kernels; in place, once or again after `adapt`.

    Returns:
        The denoiser itself.
    """
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear) and _contiguous not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_contiguous)
        # Not for subclasses, which have a forward of their own. A changed class keeps the parameters' names.
        elif type(layer) is nn.RMSNorm:
            layer.__class__ = _FusedRMSNorm
    return denoiser


def _contiguous(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook of a linear layer: its input, laid out in memory without gaps.

    For any other layout torch chooses its matrix product by whether the weight requires a gradient, so that the policy
    and a reference with the same weights may differ in the last bit (SDXL, SD3, Sana's adapters).
    """
    return (inputs[0].contiguous(), *inputs[1:])


class _FusedRMSNorm(nn.RMSNorm):
    """An RMS norm that casts its weight to the precision of its input, as autocast does for linear layers.

    Autocast leaves RMS norms alone, and where input and weight differ in precision torch falls back from one kernel to
    half a dozen in float32, each as large as the activations. FLUX normalizes queries and keys in every block.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last axes, in x's precision."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


def store_half(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights of linear and convolution layers to a precision, in place; for models that are not trained.

    These are the layers that autocast casts on every call. All others, norms above all, stay float32: a model stored in
    half precision throughout differs from its float32 twin, and the logit after a hard copy would not be exactly 0.

    Returns:
        The denoiser itself.
    """
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(dtype)
    return denoiser
