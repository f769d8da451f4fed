"""Norms that compute in their input's precision.

On a GPU autocast would run group, layer and RMS norms in float32, and with them the cast before and whatever follows up
to the next convolution or matrix product, on tensors twice as large. Their kernels sum in float32 either way; only
weight, bias and result are rounded. An input of float32 is computed as ever.

Each class takes the place of its parent in a denoiser, by `layers.prepare`, and so has its parameters and their names.
"""

import torch
from diffusers.models import normalization
from torch import Tensor, nn
from torch.nn import functional


class GroupNorm(nn.GroupNorm):
    """A group norm in its input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, (B, C, ...), in x's precision."""
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return functional.group_norm(x, self.num_groups, _like(x, self.weight), _like(x, self.bias), self.eps)


class LayerNorm(nn.LayerNorm):
    """A layer norm in its input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last axes, in x's precision."""
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return functional.layer_norm(x, self.normalized_shape, _like(x, self.weight), _like(x, self.bias), self.eps)


class RMSNorm(nn.RMSNorm):
    """An RMS norm in its input's precision.

    Torch before 2.12 has no autocast for it, and falls back from one kernel to half a dozen in float32 where input and
    weight differ in precision. FLUX normalizes queries and keys in every block.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last axes, in x's precision."""
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return functional.rms_norm(x, self.normalized_shape, _like(x, self.weight), self.eps)


class DiffusersRMSNorm(normalization.RMSNorm):
    """Diffusers' RMS norm, of SD3.5, Qwen-Image, Z-Image and Sana, in its input's precision and as one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last axes, in x's precision."""
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            normed = functional.rms_norm(x, tuple(self.dim), _like(x, self.weight), self.eps)
            return normed if self.bias is None else normed + self.bias.to(x.dtype)


def _like(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A parameter in the input's precision, as autocast casts weights of linear layers; None where there is none."""
    return None if parameter is None else parameter.to(x.dtype)


#: What takes a norm's place; of exactly these classes, since their other subclasses have a forward of their own.
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    normalization.RMSNorm: DiffusersRMSNorm,
}
