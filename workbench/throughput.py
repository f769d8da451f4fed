"""`python -m workbench.throughput`: what training the real models costs, counted or measured."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workbench.common.command_line import command, device_option, set_option, silence_transformers
from workbench.common.paths import shipped

if TYPE_CHECKING:
    from workbench.benchmarks.plan import Cluster

EXPERIMENTS = shipped("experiments")
REAL = ("sd15", "sdxl", "sd3", "flux1", "flux2-klein", "qwen-image", "z-image", "sana")
#: Shapes of ours: parts of a real one, trained by its experiment files, and one that a CPU measures in seconds.
PARTS = ("flux1-part",)
PLANNED = ("sd15", "sdxl", "sd3", "flux1")  # whose text encoders `benchmarks.costs` knows


@click.option(
    "--shape",
    "shapes",
    type=click.Choice([*REAL, *PARTS, "tiny"]),
    multiple=True,
    help="Model; repeatable. Default: the real ones.",
)
@click.option("--variant", "variants", type=click.Choice(["full", "lora"]), multiple=True, help="Only this one.")
@click.option(
    "--utilisation", type=click.FloatRange(0.01, 1), default=0.4, show_default=True,
    help="Share of the peak rate that GPU-hours assume.",
)  # fmt: skip
@click.option("--measure", is_flag=True, help="Train on this machine with random weights and data.")
@click.option("--plan", "planned", is_flag=True, help="What a run on several GPUs takes, and what breaks first.")
@click.option(
    "--gpu", type=click.Choice(["H100", "A100"]), default="H100", show_default=True, help="Kind of GPU, for --plan."
)
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="GPUs in all, for --plan.")
@click.option(
    "--gpus-a-machine", type=click.IntRange(1), default=8, show_default=True, help="GPUs in a machine, for --plan."
)
@click.option(
    "--network",
    type=click.FloatRange(0, min_open=True),
    default=50,
    show_default=True,
    help="GB/s of each GPU to other machines, one direction.",
)
@click.option(
    "--disk",
    type=click.FloatRange(0, min_open=True),
    default=2,
    show_default=True,
    help="GB/s that all GPUs together read.",
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="measured.json of --measure on this kind of GPU, whose seconds a pair replace the utilisation.",
)
@click.option(
    "--steps", type=click.IntRange(4), default=200, show_default=True, help="Timed steps of each measurement."
)
@click.option("--batch-size", type=click.IntRange(1), help="Pairs a forward pass. Default: the experiment file's.")
@click.option("--compile", "compiled", is_flag=True, help="Measure with torch.compile.")
@set_option
@device_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports/throughput"), show_default=True,
    help="Folder of what is written.",
)  # fmt: skip
def main(
    shapes: tuple[str, ...], variants: tuple[str, ...], utilisation: float, measure: bool, planned: bool,
    gpu: str, gpus: int, gpus_a_machine: int, network: float, disk: float, measured: Path | None, steps: int,
    batch_size: int | None, compiled: bool, overrides: tuple[str, ...], device: str, out: Path,
) -> None:  # fmt: skip
    """Costs of the experiment files of the real models, from their shapes alone: no weights, no data, no network.

    Counts the FLOPs of a training step and prints GPU-hours at an assumed utilisation. With --measure it trains the
    shapes with random weights here and says what was reached: seconds a pair, peak memory, share of the machine's own
    rate of matrix products, whether the loss's logit is exactly 0 once the reference is a copy of the policy, and that
    all numbers stayed finite. What does not fit is a line saying so, and is tried again with half the batch.

    With --plan it says what a run takes on several GPUs: seconds a step, communication (ddp, or --set
    train.parallel=fsdp), memory, encoding, loading, storage, metrics, and which limit is reached first. The pairs of a
    step stay those of the experiment file.

    Writes OUT/costs.md and .json, or measured.md or plan.md and their .json, after each line. A measurement needs
    torch, diffusers and what they bring along, no more.

    \b
    Examples:
      python -m workbench.throughput
      python -m workbench.throughput --measure --shape sd15 --variant full
      python -m workbench.throughput --measure --shape sdxl --variant lora --compile --set train.checkpointing=false
      python -m workbench.throughput --measure --shape tiny --device cpu --steps 20
      python -m workbench.throughput --plan --shape sdxl --variant full --gpus 64
    """
    from workbench.training.experiment_file import parse_override

    silence_transformers()
    changed = dict(parse_override(text) for text in overrides)
    asked = shapes or REAL
    kinds = variants or ("full", "lora")
    if planned:
        from workbench.benchmarks.plan import GPUS, Cluster

        cluster = Cluster(GPUS[gpu], gpus, gpus_a_machine, 1e9 * network, 1e9 * disk)
        _print_plans(shapes or PLANNED, kinds, changed, utilisation, batch_size, cluster, gpu, measured, out / "plan")
    elif measure:
        rows = _measured(asked, kinds, changed, steps, batch_size, compiled, device)
        _print(rows, MEASURED, out / "measured")
    else:
        rows = _counted(asked, kinds, changed, utilisation)
        _print(rows, COUNTED, out / "costs")
        click.echo(
            f"\nFrom FLOPs, not measured: every multiplication and addition of matrix products, convolutions and "
            f"attention, at {utilisation:.0%} of the dense bf16 peak (H100 989, A100 312 TFLOP/s). Training alone: "
            "encoding, diagnostics and samples come on top. State: weights, gradients, optimizer, no activations."
        )


def _settings(shape: str, variant: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved settings of a shape's experiment file; the tiny shape trains with the defaults, in bf16."""
    from workbench.training.experiment_file import load

    if shape == "tiny":
        lora = {"lora.rank": 4} if variant == "lora" else {}
        return load(None, {"model.dtype": "bfloat16", **lora, **changed}).flat()
    name = shape.removesuffix("-part")
    full, adapters = EXPERIMENTS / f"{name}.toml", EXPERIMENTS / f"{name}-lora.toml"
    if variant == "lora":
        return load(adapters, changed).flat()
    # The largest models come with a file for LoRA alone; a full fine-tune is then counted with its other settings.
    return (
        load(full, changed).flat()
        if full.is_file()
        else load(adapters, {"lora.rank": 0, "lora.alpha": 0, **changed}).flat()
    )


COUNTED = {
    "experiment": "experiment", "variant": "variant", "step": "TFLOP a pair", "again": "with checkpointing",
    "state": "state, GB", "pairs": "pairs", "uses": "as the file says", "H100": "H100 hours", "A100": "A100 hours",
}  # fmt: skip
MEASURED = {
    "shape": "shape", "variant": "variant", "compile": "compile", "batch": "pairs a pass",
    "checkpointing": "checkpointing", "milliseconds": "ms a pair", "memory": "peak GB",
    "share": "model FLOP utilisation", "exact": "logit 0 after copy", "steps": "finite steps", "problem": "problem",
}  # fmt: skip


def _counted(
    shapes: tuple[str, ...], variants: tuple[str, ...], changed: Mapping[str, Any], utilisation: float
) -> Iterator[dict[str, Any]]:
    from workbench.benchmarks import costs
    from workbench.common.markdown import two_digits
    from workbench.models import SHAPES
    from workbench.training.config import resolve

    for shape in shapes:
        for variant in variants:
            settings = _settings(shape, variant, changed)
            cost = costs.count(SHAPES[shape], settings["lora.rank"])
            pairs, again = costs.pairs_of(settings), settings["train.checkpointing"]
            copies = costs.copies_of(resolve(settings))
            state = costs.state_bytes(cost, settings["train.optimizer"], settings["model.dtype"], **copies)
            flops = cost.recomputed if again else cost.step
            hours = {
                gpu: two_digits(costs.gpu_hours(pairs, flops, peak * utilisation)) for gpu, peak in costs.PEAKS.items()
            }
            yield {
                "experiment": shape, "variant": variant, "step": two_digits(cost.step / 1e12),
                "again": two_digits(cost.recomputed / 1e12), "pairs": f"{pairs:,}",
                "state": two_digits(state / 1e9),
                "uses": "checkpointing" if again else "no checkpointing", **hours, "cost": asdict(cost),
            }  # fmt: skip


def _measured(
    shapes: tuple[str, ...], variants: tuple[str, ...], changed: Mapping[str, Any], steps: int,
    batch_size: int | None, compiled: bool, device: str,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    import torch

    from workbench.benchmarks import costs
    from workbench.benchmarks.measurement import matrix_rate, measure
    from workbench.common.distributed import pick_device
    from workbench.common.markdown import two_digits
    from workbench.models import SHAPES

    place = pick_device(device)
    rate = matrix_rate(place, torch.bfloat16)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    click.echo(f"{name}, torch {torch.__version__}; bf16 matrix product: {rate / 1e12:.3g} TFLOP/s\n")
    for shape in shapes:
        for variant in variants:
            settings = _settings(shape, variant, changed)
            cost = costs.count(SHAPES[shape], settings["lora.rank"])
            batch, problem = batch_size or settings["train.batch_size"], "yes"
            while problem and batch:
                settings |= {"train.batch_size": batch, "model.compile": compiled or settings["model.compile"]}
                found = measure(settings, SHAPES[shape], steps=steps, device=place)
                problem = found.problem
                # FLOPs that the method needs; those of recomputed activations do not count as use of the machine.
                share = cost.step / found.seconds / rate if found.seconds else None
                yield {
                    "shape": shape, "variant": variant, "compile": _yes(settings["model.compile"]), "batch": batch,
                    "checkpointing": _yes(settings["train.checkpointing"]), "device": name, "rate": rate,
                    "torch": torch.__version__,
                    "milliseconds": None if problem else two_digits(1e3 * found.seconds),
                    "memory": two_digits(found.memory / 1e9) if found.memory else None,
                    "share": share and f"{share:.1%}", "exact": None if problem else _yes(found.exact_zero),
                    "steps": found.steps or None, "problem": problem, "measured": asdict(found),
                }  # fmt: skip
                # Half the batch helps against too little memory only; 0 ends the loop.
                batch = batch // 2 if problem.startswith("out of memory") else 0


def _print_plans(
    shapes: tuple[str, ...], variants: tuple[str, ...], changed: Mapping[str, Any], utilisation: float,
    batch_size: int | None, cluster: "Cluster", gpu: str, measured: Path | None, place: Path,
) -> None:  # fmt: skip
    """Print each plan as a table of its own as soon as it is made, and write all as columns of one."""
    from workbench.benchmarks import planned_run
    from workbench.common.outputs import require_own

    place.parent.mkdir(parents=True, exist_ok=True)
    require_own(place.parent, f"{place.name}.md", f"{place.name}.json")
    plans = {}
    for shape in shapes:
        for variant in variants:
            settings = _settings(shape, variant, changed)
            row = planned_run.last_measured(measured, shape, variant, gpu) if measured else None
            work = planned_run.work_of(shape, settings, utilisation, batch_size, cluster, row)
            name = f"{shape} {variant}, {cluster.gpus} GPUs"
            plans[name] = planned_run.shown(work, cluster, row)
            click.echo(f"{planned_run.table({name: plans[name]})}\n")
            _write(planned_run.table(plans), plans, place)
    click.echo(planned_run.NOTE)


def _print(rows: Iterator[dict[str, Any]], head: dict[str, str], place: Path) -> None:
    """Write every row as soon as it is there, so that what was measured stays."""
    from workbench.common.markdown import markdown_table
    from workbench.common.outputs import require_own

    place.parent.mkdir(parents=True, exist_ok=True)
    require_own(place.parent, f"{place.name}.md", f"{place.name}.json")
    kept: list[dict[str, Any]] = []
    for row in rows:
        kept.append(row)
        table = markdown_table(list(head.values()), [[r[key] for key in head] for r in kept])
        lines = table.splitlines()
        click.echo("\n".join(lines if len(kept) == 1 else lines[-1:]))
        _write(table, kept, place)


def _write(table: str, content: Any, place: Path) -> None:
    """Write a table and what it was made of as PLACE.md and PLACE.json."""
    from workbench.common.outputs import output_file

    for suffix, text in ((".md", table), (".json", json.dumps(content, indent=1))):
        with output_file(place.with_suffix(suffix)) as path:
            path.write_text(f"{text}\n", encoding="utf-8")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


main = command(main)

if __name__ == "__main__":
    main()
