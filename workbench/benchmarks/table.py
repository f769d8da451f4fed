"""The benchmark's table and figure, kept from one call to the next."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from workbench.benchmarks.figure import Figure, Options
from workbench.common.markdown import markdown_table
from workbench.common.outputs import output_file
from workbench.common.processes import cores

LEAST = 0.03  # that the figure shows, of a goal
HEAD = f"{'figure':62s} {'median':>9s}  {'10 % to 90 %':>19s}  {'goal':>9s}"


def machine(options: Options) -> str:
    """One line on the machine, Python and torch that figures are measured with."""
    if options.device.type == "cuda":
        name = torch.cuda.get_device_name(options.device)
    else:
        known = [line for line in _cpuinfo() if line.startswith("model name")]
        name = known[0].partition(":")[2].strip() if known else platform.machine()
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a process"
    return f"{name}, {cores()} cores, {threads}, Python {platform.python_version()}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def line(figure: Figure) -> str:
    """One line of text for a measured figure, whose columns HEAD names."""
    verdict = "" if figure.met is None else "  met" if figure.met else "  MISSED"
    span = f"{_number(figure.low)} to {_number(figure.high)}"
    return (
        f"{figure.name:62s} {_number(figure.median) + ' ' + figure.unit:>9s}  {span:>19s}  {_goal(figure):>9s}{verdict}"
    )


def _goal(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    return f"{'>=' if figure.at_least else '<='} {_number(figure.goal)}"


def _number(value: float) -> str:
    """Three figures, whole numbers from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.995 else f"{value:.2f}"


def load(folder: Path) -> list[Figure]:
    """Read the figures that an earlier call has written to bench.json; none where there is no such file."""
    path = folder / "bench.json"
    return [Figure(**one) for one in json.loads(path.read_text("utf-8"))] if path.is_file() else []


def write(figures: Sequence[Figure], folder: Path, options: Options) -> None:
    """Write bench.json, from which a later call goes on, bench.md and bench.png."""
    # First: a later call makes the table and the figure from it again.
    with output_file(folder / "bench.json") as path:
        path.write_text(json.dumps([figure.as_dict() for figure in figures], indent=1) + "\n", encoding="utf-8")
    rows = [
        (
            f.name,
            f"{_number(f.median)} {f.unit}".strip(),
            f"{_number(f.low)} to {_number(f.high)}",
            _goal(f),
            "" if f.met is None else "yes" if f.met else "**no**",
            f.note,
        )
        for f in figures
    ]
    text = markdown_table(("figure", "median", "10 % to 90 %", "goal", "met", ""), rows)
    with output_file(folder / "bench.md") as path:
        path.write_text(f"{machine(options)}\n\n{text}\n", encoding="utf-8")
    with output_file(folder / "bench.png") as path:
        draw(figures, path)


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Figures with a goal, controls aside, as multiples of it: left of 1 is met (inverted where more is better)."""
    from matplotlib.figure import Figure as Canvas

    # From last to first: the y axis counts from below, and the table from above.
    shown = [f for f in figures if f.goal and not f.name.startswith("control")][::-1]
    canvas = Canvas(figsize=(9, 1 + 0.24 * max(len(shown), 3)), layout="constrained")
    axes = canvas.subplots()
    for place, f in enumerate(shown):
        goal = f.goal or 1.0
        low, median, high = (
            max(LEAST, goal / max(v, 1e-9) if f.at_least else v / goal) for v in (f.low, f.median, f.high)
        )
        colour = "tab:green" if f.met else "tab:red"
        axes.plot([low, high], [place, place], color=colour, lw=2)
        axes.plot([median], [place], "o", color=colour)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(shown)), [f.name for f in shown], fontsize=7)
    axes.margins(y=0.03)
    axes.set_xscale("log")
    axes.set_xlabel("measured / goal, 10 to 90 %; left of the line is met")
    canvas.savefig(path, dpi=150, format="png")
