"""`python -m workbench.bench`: what a training step costs against what it must cost, on this machine."""

import json
from pathlib import Path

import click

from workbench.cli import command, silence_transformers


@click.option("--repeats", type=click.IntRange(5), default=15, show_default=True, help="Measurements of each figure.")
@click.option("--model", default="embedded", show_default=True, help="Checkpoint folder to measure.")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports/bench"), show_default=True)
def main(repeats: int, model: str, device: str, out: Path) -> None:
    """Measure the training step against its floor: policy forward and backward and reference forward, nothing else.

    Each figure is the median of ratios of measurements taken in turn (A, B, A, B, ...), with the 10th and 90th
    percentile; the control measures the floor against itself and should be 1. One CPU thread unless
    OMP_NUM_THREADS says otherwise. Writes OUT/bench.json: a list of objects with name, median, low, high, goal, met.
    """
    import time
    from collections.abc import Callable, Iterator
    from functools import partial
    from typing import Any

    import numpy as np
    import torch
    from tqdm import tqdm

    from workbench.backends import load
    from workbench.objectives import dpo
    from workbench.pairs import Batch
    from workbench.processes import pick_device
    from workbench.reference import Divergence, Reference, Rule
    from workbench.timesteps import uniform
    from workbench.trainer import noised, train

    silence_transformers()
    place = pick_device(device)
    backend = load(model, place)
    policy, fixed = backend.denoiser().requires_grad_(True), backend.denoiser()
    config: Any = policy.config
    shape, process = (config.in_channels, config.sample_size, config.sample_size), backend.process.to(place)
    told = backend.encode_text(["a fox on a blue background, noto style"])
    of_pair = backend.pair_condition(backend.resolution, backend.resolution, 0, 0)
    told |= {name: x[None].to(place) for name, x in of_pair.items()}

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize()

    def seconds(work: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    def ratios(ours: Callable[[], object], floor: Callable[[], object], name: str) -> np.ndarray:
        for _ in range(3):
            ours(), floor()
        bar = tqdm(range(repeats), desc=name, leave=False)
        return np.array([seconds(ours) / seconds(floor) for _ in bar])

    figures = []

    def report(name: str, values: np.ndarray, goal: float) -> None:
        low, median, high = (float(v) for v in np.percentile(values, [10, 50, 90]))
        figures.append({"name": name, "median": median, "low": low, "high": high, "goal": goal, "met": median <= goal})
        click.echo(f"{name:48s} {median:.3f}  ({low:.3f} to {high:.3f})  goal {goal:.2f}")

    for size in (4, 16):
        x_w, x_l = torch.randn(2, size, *shape, device=place)
        batch = Batch(x_w, x_l, {name: x.expand(size, *x.shape[1:]) for name, x in told.items()})

        def endless(batch: Batch = batch) -> Iterator[Batch]:
            while True:
                yield batch

        t = torch.randint(backend.timesteps, (size,), device=place)
        inputs = noised(batch, t, torch.randn(size, *shape, device=place), process)[:3]

        def floor(inputs: Any = inputs) -> None:
            policy.zero_grad(set_to_none=True)
            backend.denoise(policy, *inputs).square().mean().backward()
            with torch.no_grad():
                backend.denoise(fixed, *inputs)

        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
        loop = train(
            policy,
            Reference(fixed, Rule(), lambda m: Divergence(0.0, 0.0), dict),
            endless(),
            denoise=backend.denoise,
            objective=dpo,
            process=process,
            density=uniform(process.abar),
            lam=torch.ones(backend.timesteps, device=place),
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            scaler=torch.amp.GradScaler(enabled=False),
            steps=10_000,
            accumulation=1,
            clip=1.0,
            generator=torch.Generator().manual_seed(0),
            check_every=1 if place.type == "cpu" else 16,
        )
        report(f"control: floor against itself, {size} pairs", ratios(floor, floor, "control"), 1.02)
        report(f"training step against its floor, {size} pairs", ratios(partial(next, loop), floor, "step"), 1.15)
        click.echo(f"  the floor is {1e3 * np.median([seconds(floor) for _ in range(5)]):.1f} ms")
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(figures, indent=2))


main = command(main)

if __name__ == "__main__":
    main()
