"""What training must cost: FLOPs counted on shapes alone, and the GPU-hours and memory that follow from them.

F = one forward pass of the denoiser on one image. A pair is two images, so a full step takes about 8 F a pair (policy
forward 2 F and backward 4 F, reference forward 2 F), LoRA about 6 F, recomputed activations about 2 F more.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from workbench.data.pairs import Batch
from workbench.method.objectives import dpo
from workbench.models import Shape, random_backend
from workbench.models.lora import lora_config
from workbench.training.config import Config
from workbench.training.loop import pair_errors

#: Dense bf16 matrix rate by the makers' data sheets (SXM boards), FLOP/s.
PEAKS = {"H100": 989e12, "A100": 312e12}
#: Bytes of an optimizer's state for each trained weight; Adafactor's rows and columns are next to nothing.
#: Those of paged AdamW may lie in the machine's memory.
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adamw_paged": 8.0, "adafactor": 0.0, "prodigy": 16.0}


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
    from torch.utils.flop_counter import FlopCounterMode

    backend = random_backend(shape, torch.device("meta"))
    policy: Any = backend.denoiser().requires_grad_(not lora)
    reference: Any = policy
    weights = sum(p.numel() for p in policy.parameters())
    if lora:  # the same denoiser is the reference, with adapters of the same size
        # peft makes adapters on the default device, and this denoiser is on the meta device.
        with backend.device:
            policy.add_adapter(lora_config(policy, lora, lora, backend.LORA_TARGETS))
    again = _checkpoint(policy)
    place = backend.device
    x = torch.zeros(1, *backend.latent_shape, device=place)
    told = {name: torch.zeros(1, *size, device=place) for name, size in shape.condition.items()}
    t = torch.zeros(1, dtype=torch.int64, device=place)
    process = backend.process.to(place)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        backend.denoise(policy, x, t, told)
    # Only the step has a backward pass, so only its counter needs the corrected formula.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointing finds no device of the name "meta"
        errors = pair_errors(backend.denoise, policy, reference, Batch(x, x, told), t, x, process)
        dpo(errors, torch.ones(1, device=place)).mean().backward()
    recomputed = step.get_total_flops()
    return Cost(
        float(one.get_total_flops()), float(recomputed - sum(again)), float(recomputed), weights, _trained(policy)
    )


def _checkpoint(policy: Any) -> list[int]:
    """Turn on a denoiser's gradient checkpointing.

    One step then says what both kinds of steps take: without checkpointing nothing is computed twice, and all else is
    the same.

    Returns:
        The FLOPs of each part that a backward pass computes again, added to while it runs.
    """
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    again: list[int] = []

    @contextmanager
    def counted() -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            try:
                yield
            finally:  # torch leaves a part by an exception, as soon as it has all activations that it wants
                again.append(counter.get_total_flops())

    policy.enable_gradient_checkpointing(
        partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), counted()))
    )
    return again


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


def state_bytes(
    cost: Cost, optimizer: str, precision: str = "bfloat16", *, averaged: bool = False, mixed: bool = False
) -> float:
    """Memory that does not depend on the batch: weights, gradients, optimizer state; activations come on top.

    Policy and gradients in float32; the reference, or all that LoRA does not train, in the precision of the forward
    passes, as are the copies of the policy that autocast makes in half precision. Norms and biases, which are float32
    everywhere, are too few to matter.

    Args:
        averaged: whether a moving average of what is trained is kept too, in float32.
        mixed: whether the reference is a mixture of itself and the policy, which is kept in float32.
    """
    fixed, copies = (4, 0) if precision == "float32" else (2, 2)
    each = 4 + 4 + copies + STATE_BYTES[optimizer] + (4 if averaged else 0)
    return cost.trained * each + (4 if mixed else fixed) * cost.weights


def copies_of(config: Config) -> dict[str, bool]:
    """`averaged` and `mixed` of `state_bytes`, as a run of these settings has them (`training.build`)."""
    rule_of, settings = config.chosen("reference")
    # LoRA's reference is a set of adapters; the denoiser below it is never moved.
    return {
        "averaged": bool(config.train.ema),
        "mixed": not config.lora.rank and rule_of(**settings).rate < 1,
    }


#: Layers of the text encoders by family: (weights of matrices that every token passes, tokens). CLIP-L: 12 layers of
#: width 768; OpenCLIP-bigG: 32 of width 1280; T5-XXL: 24 of width 4096, three feed-forward matrices of width 10240.
CLIP_L, CLIP_G, T5_XXL = 12 * 12 * 768**2, 32 * 12 * 1280**2, 24 * (4 * 4096**2 + 3 * 4096 * 10240)
TEXT_ENCODERS = {
    "sd": ((CLIP_L, 77),),
    "sdxl": ((CLIP_L, 77), (CLIP_G, 77)),
    "sd3": ((CLIP_L, 77), (CLIP_G, 77), (T5_XXL, 256)),
    "flux1": ((CLIP_L, 77), (T5_XXL, 512)),
}


def encoder_flops(shape: Shape) -> tuple[float, float]:
    """FLOPs of encoding a pair's two images, counted on the meta device, and one caption, two a weight and token.

    Args:
        shape: of a family in TEXT_ENCODERS; all of these have diffusers' AutoencoderKL.
    """
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    edge = random_backend(shape, torch.device("meta")).resolution
    blocks = len(shape.vae["block_out_channels"])
    parts = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    with torch.device("meta"), FlopCounterMode(display=False) as images, torch.no_grad():
        model: Any = AutoencoderKL.from_config({**shape.vae, **parts, "layers_per_block": 2})
        model.encode(torch.zeros(2, 3, edge, edge))
    return float(images.get_total_flops()), sum(
        2.0 * weights * tokens for weights, tokens in TEXT_ENCODERS[shape.family]
    )


def store_bytes(shape: Shape, precision: str) -> tuple[float, float]:
    """Bytes of the encoded store: of a pair, which are two latents and what is told of it, and of a caption.

    Args:
        precision: of what is stored, "float32" or "float16".
    """
    number = getattr(torch, precision).itemsize
    latents = math.prod(random_backend(shape, torch.device("meta")).latent_shape)
    sizes = {name: math.prod(size) for name, size in shape.condition.items()}
    of_pair = sizes.pop("time_ids", 0)
    caption = torch.int64.itemsize  # which caption
    return number * (2 * latents + of_pair) + caption, number * sum(sizes.values())


def pairs_of(settings: Mapping[str, Any]) -> int:
    """Pairs that a run with these resolved settings trains on, on one process."""
    return settings["train.steps"] * settings["train.batch_size"] * settings["train.accumulation"]
