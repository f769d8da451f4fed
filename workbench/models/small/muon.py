"""Muon (Jordan et al. 2024): momentum, orthogonalised, for weight matrices and convolutions.

`torch.optim.Muon` takes matrices alone; the autoencoder's weights are convolutions. With it the autoencoder learns as
much in 50 steps as in 300 with AdamW.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, nearly, by Newton and Schulz's iteration, (N, rows, columns)."""
    # x x^T is the smaller of the two products where x is wide.
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    # The iteration needs singular values of at most 1, and the Frobenius norm bounds the largest.
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # Jordan's coefficients, made for few steps: singular values end near 1 and not exactly at it.
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps of fixed spectral size along the orthogonalised momentum.

    Args:
        params: weights of two or more dimensions; all but the first are flattened.
        lr: spectral size of a step of a weight that is not tall.
        weight_decay: share of a weight that a step takes off, times `lr`.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.1
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            # Weights of one shape are stacked, so that many small products become one of a batch.
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[len(p), p[0].numel()].append(p)
            for (rows, columns), params in alike.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["average"] = torch.zeros_like(p)
                averages: list[Tensor] = [self.state[p]["average"] for p in params]
                grads = [p.grad for p in params if p.grad is not None]
                weights: list[Tensor] = list(params)
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                # Nesterov's momentum: the gradient counts once more than in the average.
                ahead = torch._foreach_lerp(grads, averages, group["momentum"])
                update = orthogonalised(torch.stack([x.flatten(1) for x in ahead]))
                # Larger for tall matrices, as in Jordan's code.
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                # Weight decay apart from the gradient, as in AdamW.
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, [u.view_as(p) for u, p in zip(update, params, strict=True)], alpha=-size)


def optimizers(module: nn.Module, lr: float, muon: float) -> list[torch.optim.Optimizer]:
    """AdamW for a network's vectors, embeddings, first and last layers; Muon for its other weights if `muon` > 0.

    Args:
        lr: of AdamW.
        muon: learning rate of Muon; 0 leaves all to AdamW.
    """
    edges = ("conv_in", "conv_out", "quant", "embedding", "classifier", "embed")
    hidden = lambda name, p: muon > 0 and p.ndim > 1 and not any(word in name for word in edges)  # noqa: E731
    inner = [p for name, p in module.named_parameters() if hidden(name, p)]
    outer = [p for name, p in module.named_parameters() if not hidden(name, p)]
    adam = torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    return [adam, Muon(inner, lr=muon)] if inner else [adam]
