"""Running the benchmark's groups: each figure is shown as it is measured, the table is kept after each group."""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from workbench.benchmarks import growth, table
from workbench.benchmarks.figure import Figure, Options
from workbench.benchmarks.groups import GROUPS
from workbench.benchmarks.peers import checkouts
from workbench.common.distributed import pick_device
from workbench.common.errors import Failure
from workbench.common.outputs import output_file, require_own

FILES = ("bench.md", "bench.json", "bench.png", "growth.json", "growth.png", "parts.png")


def run_suite(
    groups: Sequence[str],
    with_growth: bool,
    *,
    repeats: int,
    sweeps: int,
    device: str,
    folder: Path,
    peers: Sequence[str] = (),
    say: Callable[[str], object],
) -> None:
    """Measure groups of figures and write the table; figures of other groups stay as an earlier call measured them.

    Args:
        groups: keys of GROUPS.
        with_growth: whether to measure how costs grow, too.
        folder: of the table and of what is made on the way.
        peers: checkouts of public scripts, NAME=FOLDER.
        say: is given a line at a time.
    Raises:
        Failure: a group failed; what it and those before it measured is in the table.
    """
    # Asked now and not after hours of measuring.
    require_own(folder, *FILES)
    scripts = checkouts(peers)
    options = Options(repeats, pick_device(device), (folder / "work").resolve(), sweeps, scripts)
    options.folder.mkdir(exist_ok=True)
    figures = table.load(folder)
    say(f"{table.machine(options)}\n\n{table.HEAD}")
    for name in groups:
        module, function = GROUPS[name]
        measured: list[Figure] = []
        failure: Failure | None = None
        try:
            for figure in getattr(import_module(f"workbench.benchmarks.{module}"), function)(options):
                say(table.line(figure))
                measured.append(figure)
        except Failure as error:
            failure = error
        # Of a group that failed on its way, an earlier call's figures stay where it has no new ones.
        now = {figure.name for figure in measured}
        kept = [figure for figure in figures if figure.group != name or (failure and figure.name not in now)]
        figures = sorted([*kept, *measured], key=lambda figure: [*GROUPS].index(figure.group))
        # After each group: groups take minutes to hours, and one that fails loses no other.
        table.write(figures, folder, options)
        if failure:
            raise failure
    if with_growth:
        series = growth.growth(options)
        with output_file(folder / "growth.png") as path:
            growth.draw(series, path)
        with output_file(folder / "growth.json") as path:
            path.write_text(json.dumps([one.as_dict() for one in series], indent=1) + "\n", encoding="utf-8")
