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
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear) and _contiguous not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_contiguous)
        # Not for subclasses, which have a forward of their own. A changed class keeps the parameters' names.
        elif type(layer) in _NORMS:
            layer.__class__ = _NORMS[type(layer)]
    return denoiser


def _contiguous(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook of a linear layer: its input, laid out in memory without gaps.

    For any other layout torch chooses its matrix product by whether the weight requires a gradient, so that the policy
    and a reference with the same weights may differ in the last bit (SDXL, SD3, Sana's adapters).
    """
    return (inputs[0].contiguous(), *inputs[1:])


class _GroupNorm(nn.GroupNorm):
    """A group norm that computes in its input's precision.

    On a GPU autocast would run it in float32, and with it the cast before it and whatever follows up to the next
    convolution, on tensors twice as large. The kernels sum in float32 either way; only weight and result are rounded.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, (B, C, ...), in x's precision."""
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.group_norm(x, self.num_groups, *_weights(self, x), self.eps)


class _LayerNorm(nn.LayerNorm):
    """A layer norm that computes in its input's precision, for the reasons of `_GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last axes, in x's precision."""
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.layer_norm(x, self.normalized_shape, *_weights(self, x), self.eps)


class _RMSNorm(nn.RMSNorm):
    """An RMS norm that computes in its input's precision.

    Autocast leaves RMS norms alone, and where input and weight differ in precision torch falls back from one kernel to
    half a dozen in float32, each as large as the activations. FLUX normalizes queries and keys in every block.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last axes, in x's precision."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: _GroupNorm, nn.LayerNorm: _LayerNorm, nn.RMSNorm: _RMSNorm,
}  # fmt: skip


def _weights(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias in the input's precision, as autocast casts those of linear layers; None where there is none."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    return weight, bias


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
