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


class _OwnPrecision(nn.Module):
    """What the norms have in common; it stands before the class whose place is taken."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, in x's precision and shape."""
        if x.dtype == torch.float32:
            return super().forward(x)
        # Cast as autocast casts the weights of linear layers; RMS norms of torch have no bias.
        parameters = (getattr(self, name, None) for name in ("weight", "bias"))
        weight, bias = (None if p is None else p.to(x.dtype) for p in parameters)
        with torch.autocast(x.device.type, enabled=False):
            return self._norm(x, weight, bias)

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm of x as one kernel, with a weight and a bias of its precision."""
        raise NotImplementedError


class GroupNorm(_OwnPrecision, nn.GroupNorm):
    """A group norm in its input's precision, (B, C, ...)."""

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


class LayerNorm(_OwnPrecision, nn.LayerNorm):
    """A layer norm in its input's precision, over the last axes."""

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(_OwnPrecision, nn.RMSNorm):
    """An RMS norm in its input's precision, over the last axes.

    Torch before 2.12 has no autocast for it, and falls back from one kernel to half a dozen in float32 where input and
    weight differ in precision. FLUX normalizes queries and keys in every block.
    """

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class DiffusersRMSNorm(_OwnPrecision, normalization.RMSNorm):
    """Diffusers' RMS norm, of SD3.5, Qwen-Image, Z-Image and Sana, in its input's precision."""

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normed = functional.rms_norm(x, tuple(self.dim), weight, self.eps)
        return normed if bias is None else normed + bias


#: What takes a norm's place; of exactly these classes, since their other subclasses have a forward of their own.
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    normalization.RMSNorm: DiffusersRMSNorm,
}
