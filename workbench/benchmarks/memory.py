"""Peak memory of training against that of the same arithmetic with as few weights as it can be done with."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.step import VARIANTS, loop, open_model
from workbench.models import SHAPES, adapt, random_backend
from workbench.training.optimizers import adamw

MODEL, PAIRS = "sd34m", 4
STEPS, INTERVAL = 5, 2  # of each run; the reference moves twice
REPEATS = 2
AT_ONCE = {"": 2 * PAIRS, ", probe by 64 images": 64}  # images of the probe; the first as a training step's
GOALS = {"full": (1.15, None), "LoRA": (1.08, 1.10)}  # of each of AT_ONCE


def peak(options: Options) -> Iterator[Figure]:
    """Peak memory of LoRA against one UNet's weights, and of a full fine-tune's against two.

    Ours is the run as `training.build` makes it, its probe and two moves of the reference included. The floor holds the
    weights that the method needs, one UNet's or two, does the same forward and backward passes, and has gradients and
    the optimizer's state of what is trained. Both sets of adapters, small against the UNet, are on both sides.

    Each side runs in processes of its own, in turn. What they hold before there is a model is not counted. On a CPU it
    is resident memory, with what the C library keeps back. The first figure has a probe that is measured by as many
    images at once as a step trains on (`diagnostics.batch_size`), the second the default's 64.
    """
    for variant, (rank, _) in VARIANTS.items():
        weights = (1 if rank else 2) * _weights(MODEL) / 1e6
        note = f"{'one UNet' if rank else 'two UNets'} of {weights:.0f} MB in all"
        name = f"{MODEL}, {variant}, {PAIRS} pairs"
        rounds = tqdm(range(REPEATS), desc=name, leave=False, disable=None)
        called = [("floor", 0), *(("train", images) for images in AT_ONCE.values())]
        found = [[in_new_process(side, MODEL, rank, options.device, images) for side, images in called] for _ in rounds]
        for place, (kind, goal) in enumerate(zip(AT_ONCE, GOALS[variant], strict=True), 1):
            ratios = [sides[place] / sides[0] for sides in found]
            yield figure("memory", f"peak / floor: {name}{kind}", ratios, goal, note=note)
        yield figure("memory", f"floor: {name}", [sides[0] / 1e6 for sides in found], None, unit="MB", note=note)


def _weights(model: str) -> int:
    """Size of one UNet's weights in float32, bytes."""
    return sum(4 * p.numel() for p in random_backend(SHAPES[model], torch.device("meta")).denoiser().parameters())


def in_new_process(side: str, model: str, rank: int, device: torch.device, images: int) -> int:
    """Peak memory of `train` or `floor`, bytes.

    Args:
        images: of the probe, at once.
    """
    call = f"measured({side!r}, {model!r}, {rank}, {str(device)!r}, {images})"
    program = f"from workbench.benchmarks.memory import measured; print({call})"
    told = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(told, stdout=subprocess.PIPE, text=True, check=True)
    # The last word: libraries may print before it.
    return int(done.stdout.split()[-1])


def measured(side: str, model: str, rank: int, name: str, images: int) -> int:
    """Peak memory of this process, bytes; the tiny shape first, as what is imported once is no part of a model."""
    device = torch.device(name)
    work = partial(train, images=images) if side == "train" else floor
    work("tiny", rank, device)
    # Garbage of the tiny model would be part of `before`, and make the peak look smaller.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident("VmRSS")
    work(model, rank, device)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")) - before


def _resident(name: str) -> int:
    """This process's memory now, "VmRSS", or at its peak, "VmHWM", bytes.

    Not `resource.getrusage`, whose peak begins with that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def train(model: str, rank: int, device: torch.device, images: int) -> None:
    """Take a few training steps of a run whose reference moves, its probe included."""
    moves = {"reference.policy": "update", "reference.interval": INTERVAL, "diagnostics.probe": 256}
    moves |= {"diagnostics.batch_size": images}
    made = loop(*open_model(model, device), pairs=PAIRS, rank=rank, settings=moves)
    for _ in range(STEPS):
        made.step()
    assert made.training.reference.updates == STEPS // INTERVAL


def floor(model: str, rank: int, device: torch.device) -> None:
    """Take as many steps of the same forward and backward passes and of the optimizer, and nothing else."""
    backend = random_backend(SHAPES[model], device)
    policy: torch.nn.Module
    fixed: torch.nn.Module
    if rank:
        policy, fixed, _ = adapt(backend.denoiser(), rank=rank, alpha=rank, targets=backend.LORA_TARGETS)
    else:
        policy, fixed = backend.denoiser().requires_grad_(True), backend.denoiser()
    optimizer = adamw(list(policy.parameters()), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0, epsilon=1e-8)
    images, told = 2 * PAIRS, SHAPES[model].condition
    x_t = torch.randn(images, *backend.latent_shape, device=device)
    t = torch.randint(backend.timesteps, (images,), device=device)
    condition = {name: torch.randn(images, *size, device=device) for name, size in told.items()}
    for _ in range(STEPS):
        with torch.no_grad():
            gradient = backend.denoise(fixed, x_t, t, condition)
        backend.denoise(policy, x_t, t, condition).backward(gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
