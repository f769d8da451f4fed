"""`python -m workbench.profile`: where a training step's time goes, beside its floor's, operator by operator."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workbench.common.command_line import command, device_option, silence_transformers
from workbench.common.validation import writable_folder

if TYPE_CHECKING:
    import torch

PYTHON = "Python between operators"
NAME = 100  # letters of a kernel's name that are printed; templates make it longer
#: Kinds of a GPU's kernels, by what their names contain; the first that fits, so that the general ones come last.
KINDS = {
    "optimizer, clipping": "multi_tensor|adam|lpnorm|NormTwoOps",
    "attention": "flash|fmha|sdpa|attention",
    "change of layout": "nchwToNhwc|nhwcToNchw|transpose",
    "matrix product, convolution": "gemm|gemv|conv|xmma|cutlass|nvjet|wgrad|dgrad|splitK",
    "norm": "norm|RowwiseMoments|GammaBeta|ComputeInternalGrad|ComputeFused",
    "concatenation": "CatArray",
    "copy, cast": "copy|memcpy|memset|fill",
    "sum, mean": "reduce",
    "elementwise": "elementwise",
}


@click.option("--model", default="embedded", show_default=True, help="embedded, or a shape: sd34m, sd15, tiny, ...")
@click.option("--pairs", type=click.IntRange(1), default=4, show_default=True, help="Pairs of a step.")
@click.option("--lora", "rank", type=click.IntRange(0), default=0, show_default=True, help="Rank; 0 = full fine-tune.")
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Steps to profile.")
@click.option(
    "--rows", type=click.IntRange(1), default=25, show_default=True, help="Rows of the table that is printed."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Precision of the forward passes.",
)  # fmt: skip
@click.option("--trace/--no-trace", "traced", default=True, help="Write a step on a time line, which may be large.")
@device_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports/profile"), show_default=True,
    help="Folder of what is written.",
)  # fmt: skip
def main(
    model: str, pairs: int, rank: int, steps: int, rows: int, dtype: str, traced: bool, device: str, out: Path
) -> None:
    """Profile the training step against its floor: two forward passes and a backward pass of the same batch.

    Each operator's own milliseconds in a step and in the floor, the largest difference first; on a GPU those of its
    kernels, and first a table of their kinds. The profiler makes small operators slower; the line above the tables has
    the times without it.

    Writes OUT/profile.md, with all operators, and OUT/trace.json, one step with its Python calls, for
    https://ui.perfetto.dev. Activations are kept, not recomputed: take as many pairs as fit.

    \b
    Examples:
      python -m workbench.profile
      python -m workbench.profile --model sd34m --pairs 16 --lora 8 --steps 3
      python -m workbench.profile --model sdxl --pairs 8 --lora 8 --steps 3 --dtype bfloat16 --no-trace
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is there: it tells of every start of the profiler
    import numpy as np
    import torch

    from workbench.benchmarks.step import loop, open_model
    from workbench.benchmarks.timing import in_turn
    from workbench.common.distributed import pick_device
    from workbench.common.errors import UserError
    from workbench.common.markdown import markdown_table
    from workbench.common.outputs import output_file, require_own
    from workbench.models import SHAPES

    silence_transformers()
    if model != "embedded" and model not in SHAPES:
        raise UserError(f"--model {model}: expected embedded, {', '.join(SHAPES)}")
    require_own(writable_folder("--out", out), "profile.md", "trace.json")
    place = pick_device(device)
    made = loop(*open_model(model, place, getattr(torch, dtype)), pairs=pairs, rank=rank)
    # Without the profiler, and before it: its own cost falls on small operators most.
    step, floor = 1e3 * np.median(in_turn(made.step, made.floor, repeats=steps, device=place), axis=1)
    ours, least = (operators(work, steps, place) for work in (made.step, made.floor))
    if traced:
        with output_file(out / "trace.json") as path:
            trace(made.step, place, path)

    def row(name: str, a: float, b: float, calls: object, of_floor: object) -> list[object]:
        return [name, f"{a:.2f}", f"{b:.2f}", f"{a - b:+.2f}", calls, of_floor]

    none = (0.0, 0.0)
    both = {name: (*ours.get(name, none), *least.get(name, none)) for name in ours | least}
    ordered = sorted(both.items(), key=lambda item: item[1][2] - item[1][0])
    table = [row(name[:NAME], a, b, f"{m:g}", f"{n:g}") for name, (a, m, b, n) in ordered]
    total = row("**total**", sum(a for a, _ in ours.values()), sum(b for b, _ in least.values()), None, None)
    head = ["operator", "step, ms", "floor, ms", "difference, ms", "calls a step", "calls a floor"]
    variant = f"LoRA {rank}" if rank else "full"
    title = (
        f"{model}, {variant}, {pairs} pairs, {dtype}, {place.type}: a step takes {step:.1f} ms, its floor "
        f"{floor:.1f} ms ({step / floor:.3f} x), without the profiler\n"
    )
    kinds = "" if place.type != "cuda" else f"{_by_kind(ours, least)}\n\n"
    with output_file(out / "profile.md") as path:
        path.write_text(f"{title}\n{kinds}{markdown_table(head, [total, *table])}\n", encoding="utf-8")
    click.echo(f"{title}\n{kinds}{markdown_table(head, [total, *table[:rows]])}\n")
    line = f"; a step on a time line: {out / 'trace.json'}" if traced else ""
    click.echo(f"{len(table)} operators: {out / 'profile.md'}{line}")


def _by_kind(step: dict[str, tuple[float, float]], floor: dict[str, tuple[float, float]]) -> str:
    """A table of the milliseconds of each kind of kernel, the longest first."""
    from workbench.common.markdown import markdown_table

    spent: dict[str, list[float]] = {}
    for column, kernels in enumerate((step, floor)):
        for name, (milliseconds, _) in kernels.items():
            spent.setdefault(kind_of(name), [0.0, 0.0])[column] += milliseconds
    rows = [[kind, *(f"{x:.1f}" for x in both)] for kind, both in sorted(spent.items(), key=lambda item: -item[1][0])]
    return markdown_table(["kind of kernel", "step, ms", "floor, ms"], rows)


def operators(work: Callable[[], object], calls: int, device: "torch.device") -> dict[str, tuple[float, float]]:
    """Own milliseconds and calls, in one call of the work, of each operator; on a GPU, of each kernel."""
    from torch.autograd.profiler import record_function
    from torch.profiler import profile

    from workbench.benchmarks.timing import wait

    work()
    with profile(activities=_activities(device), acc_events=True) as profiler:
        for _ in range(calls):
            # What this record has as its own time is in no operator: Python.
            with record_function(PYTHON):
                work()
        wait(device)
    return own_times(profiler.key_averages(), calls, device)


def own_times(events: Iterable[Any], calls: int, device: "torch.device") -> dict[str, tuple[float, float]]:
    """What `operators` returns, from the profiler's averages.

    A GPU's kernels are events beside those of the operators that started them, which have the same time once more.
    """
    from torch.autograd import DeviceType

    if device.type != "cuda":
        return {event.key: (event.self_cpu_time_total / 1e3 / calls, event.count / calls) for event in events}
    return {
        event.key: (event.self_device_time_total / 1e3 / calls, event.count / calls)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }


def kind_of(kernel: str) -> str:
    """The kind of a GPU's kernel, from its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def trace(work: Callable[[], object], device: "torch.device", place: Path) -> None:
    """Write one call of the work as a Chrome trace, with the Python functions that its operators are called from."""
    from torch.profiler import profile

    from workbench.benchmarks.timing import wait

    with profile(activities=_activities(device), with_stack=True) as profiler:
        work()
        wait(device)
    profiler.export_chrome_trace(str(place))


def _activities(device: "torch.device") -> "list[torch.profiler.ProfilerActivity]":
    from torch.profiler import ProfilerActivity

    return [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")


main = command(main)

if __name__ == "__main__":
    main()
