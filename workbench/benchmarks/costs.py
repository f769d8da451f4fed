"""What training must cost: FLOPs counted on shapes alone, and the GPU-hours and memory that follow from them.

F = one forward pass of the denoiser on one image. A pair is two images, so a full step takes about 8 F a pair (policy
forward 2 F and backward 4 F, reference forward 2 F), LoRA about 6 F, recomputed activations about 2 F more.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.data.pairs import Batch
from workbench.method.objectives import dpo
from workbench.models import Backend, Shape, random_backend
from workbench.models.lora import lora_config
from workbench.training.loop import pair_errors

#: Dense bf16 matrix rate by the makers' data sheets (SXM boards), FLOP/s.
PEAKS = {"H100": 989e12, "A100": 312e12}
#: Bytes of an optimizer's state for each trained weight; Adafactor's rows and columns are next to nothing.
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.0, "prodigy": 16.0}


@dataclass(frozen=True)
class Cost:
    """What one pair's share of a training step costs, in FLOPs, and how many weights there are.

    Attributes:
        forward: F, of one image.
        step: what the method needs.
        recomputed: what is done with gradient checkpointing, which computes activations twice.
        weights: of the denoiser.
        trained: weights that are trained.
    """

    forward: float
    step: float
    recomputed: float
    weights: int
    trained: int


def count(shape: Shape, lora: int = 0) -> Cost:
    """FLOPs of policy forward and backward and reference forward, by torch's flop counter on the meta device.

    Multiplications and additions count one each; what is no matrix product, convolution or attention counts nothing.

    Args:
        lora: rank of the adapters; 0 = full fine-tune.
    """
    backend = random_backend(shape, torch.device("meta"))
    weights = sum(p.numel() for p in backend.denoiser().parameters())
    (step, forward, trained), (recomputed, _, _) = (_step(backend, shape, lora, again) for again in (False, True))
    return Cost(forward, step, recomputed, weights, trained)


def _step(backend: Backend, shape: Shape, lora: int, checkpointing: bool) -> tuple[float, float, int]:
    """FLOPs of a step on one pair, those of F, and the number of trained weights."""
    from torch.utils.flop_counter import FlopCounterMode

    policy: Any = backend.denoiser().requires_grad_(not lora)
    reference: Any = policy
    if lora:  # the same denoiser is the reference, with adapters of the same size
        # peft makes adapters on the default device, and this denoiser is on the meta device.
        with backend.device:
            policy.add_adapter(lora_config(policy, lora, lora, backend.LORA_TARGETS))
    if checkpointing:
        policy.enable_gradient_checkpointing()
    place = backend.device
    x = torch.zeros(1, *backend.latent_shape, device=place)
    told = {name: torch.zeros(1, *size, device=place) for name, size in shape.condition.items()}
    t = torch.zeros(1, dtype=torch.int64, device=place)
    process = backend.process.to(place)
    # Only the step has a backward pass, so only its counter needs the corrected formula.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False) as one, torch.no_grad():
        backend.denoise(policy, x, t, told)
    with FlopCounterMode(display=False, custom_mapping=formulas) as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointing finds no device of the name "meta"
        errors = pair_errors(backend.denoise, policy, reference, Batch(x, x, told), t, x, process)
        dpo(errors, torch.ones(1, device=place)).mean().backward()
    return float(step.get_total_flops()), float(one.get_total_flops()), _trained(policy)


def _convolution_backward(grad_out: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    """FLOPs of a convolution's backward pass from the shapes of its arguments: as many for each gradient as forward.

    torch's own formula forgets that a grouped convolution connects few channels, and counts Sana's depthwise ones
    thousands of times.
    """
    from torch.utils.flop_counter import conv_flop_count

    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, (of_x, of_weight, _of_bias) = args
    return (of_x + of_weight) * conv_flop_count(x, weight, grad_out, transposed)


def _trained(policy: nn.Module) -> int:
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)


def gpu_hours(pairs: float, flops: float, rate: float) -> float:
    """Hours on one GPU.

    Args:
        pairs: trained on in all.
        flops: of a pair.
        rate: reached, FLOP/s.
    """
    return pairs * flops / rate / 3600


def state_gigabytes(cost: Cost, optimizer: str) -> float:
    """Memory that does not depend on the batch: weights, gradients, optimizer state; activations come on top.

    Policy in float32 with bf16 copies that autocast makes of it, gradients in float32; the reference, or all that LoRA
    does not train, in bf16. Norms and biases, which are float32 everywhere, are too few to matter.
    """
    trained = cost.trained * (4 + 4 + 2 + STATE_BYTES[optimizer])
    return (trained + 2 * cost.weights) / 1e9


def pairs_of(settings: Mapping[str, Any]) -> int:
    """Pairs that a run with these resolved settings trains on, on one process."""
    return settings["train.steps"] * settings["train.batch_size"] * settings["train.accumulation"]
