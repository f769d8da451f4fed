"""Peak memory of training against that of the same arithmetic with as few weights as it can be done with."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from workbench.adapters import adapt
from workbench.benches.figure import Figure, Options, figure
from workbench.benches.step import VARIANTS, loop
from workbench.optimizers import adamw
from workbench.shapes import SHAPES, random_backend

MODEL, PAIRS = "sd34m", 4
STEPS, INTERVAL = 5, 2  # of each run; the reference moves twice
REPEATS, GOAL = 3, 1.15
SIDES = ("train", "floor")
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc's: above 64 KiB back at once


def peak(options: Options) -> Iterator[Figure]:
    """Peak memory of LoRA against one UNet's weights, and of a full fine-tune's against two.

    Ours is the run as `run.start` makes it, its probe and two moves of the reference included. The floor holds the
    weights that the method needs, one UNet's or two, does the same forward and backward passes, and has gradients and
    the optimizer's state of what is trained. Both sets of adapters, small against the UNet, are on both sides.

    Each side runs in processes of its own, in turn. What they hold before there is a model is not counted. The goal is
    for what tensors take: on a CPU the C library is told to give every tensor's memory back at once. What it keeps
    otherwise, as it likes, is a figure without a goal.
    """
    kinds = {"": EXACT} if options.device.type == "cuda" else {"": EXACT, ", as the C library keeps it": {}}
    for variant, (rank, _) in VARIANTS.items():
        weights = (1 if rank else 2) * _weights(MODEL) / 1e6
        note = f"{'one UNet' if rank else 'two UNets'} of {weights:.0f} MB in all"
        for kind, environment in kinds.items():
            name = f"{MODEL}, {variant}, {PAIRS} pairs{kind}"
            rounds = tqdm(range(REPEATS), desc=name, leave=False, disable=None)
            sides = [[in_new_process(s, MODEL, rank, options.device, environment) for s in SIDES] for _ in rounds]
            goal = GOAL if environment else None
            yield figure("memory", f"peak / floor: {name}", [ours / least for ours, least in sides], goal, note=note)
            yield figure("memory", f"floor: {name}", [least / 1e6 for _, least in sides], None, unit="MB", note=note)


def _weights(model: str) -> int:
    """Of one UNet, bytes, float32."""
    return sum(4 * p.numel() for p in random_backend(SHAPES[model], torch.device("meta")).denoiser().parameters())


def in_new_process(side: str, model: str, rank: int, device: torch.device, environment: Mapping[str, str]) -> int:
    """Peak memory of `train` or `floor`, bytes.

    Args:
        environment: what it is told beyond this process's.
    """
    call = f"measured({side!r}, {model!r}, {rank}, {str(device)!r})"
    program = f"from workbench.benches.memory import measured; print({call})"
    told = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(told, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def measured(side: str, model: str, rank: int, name: str) -> int:
    """Peak memory of this process, bytes; the tiny shape first, as what is imported once is no part of a model."""
    device, work = torch.device(name), {"train": train, "floor": floor}[side]
    work("tiny", rank, device)
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
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def train(model: str, rank: int, device: torch.device) -> None:
    """A few steps of a run."""
    moves = {"reference.policy": "update", "reference.interval": INTERVAL, "diagnostics.probe": 256}
    made = loop(model, pairs=PAIRS, rank=rank, device=device, settings=moves)
    for _ in range(STEPS):
        made.step()
    assert made.started.reference.updates == STEPS // INTERVAL


def floor(model: str, rank: int, device: torch.device) -> None:
    """The same arithmetic and nothing else."""
    backend = random_backend(SHAPES[model], device)
    policy: torch.nn.Module
    fixed: torch.nn.Module
    if rank:
        policy, fixed, _ = adapt(backend.denoiser(), rank=rank, alpha=rank, targets=backend.LORA_TARGETS)
    else:
        policy, fixed = backend.denoiser().requires_grad_(True), backend.denoiser()
    optimizer = adamw(list(policy.parameters()), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    images, told = 2 * PAIRS, SHAPES[model].told
    x_t = torch.randn(images, *SHAPES[model].latent, device=device)
    t = torch.randint(backend.timesteps, (images,), device=device)
    condition = {name: torch.randn(images, *size, device=device) for name, size in told.items()}
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            gradient = backend.denoise(fixed, x_t, t, condition)
        backend.denoise(policy, x_t, t, condition).backward(gradient)
        optimizer.step()
