"""The time that the report of a study of many runs takes."""

import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np

from workbench import tracking
from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.invented_study import invent
from workbench.benchmarks.sandbox import databases, run_command, sandbox, temporary_folder
from workbench.benchmarks.stopwatch import stopwatch
from workbench.benchmarks.timing import seconds
from workbench.common.errors import UserError
from workbench.common.paths import shipped
from workbench.studies import results


def report(options: Options, runs: int = 50, command: bool = True) -> Iterator[Figure]:
    """All notebooks on a study of invented runs, in this process, whose imports are done; and what reading them takes.

    Args:
        command: whether the command that makes the page is timed too, once.
    """
    with temporary_folder(options.folder) as folder:
        stores = {name: databases(folder)[name] for name in ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE")}
        with sandbox(folder, **stores, MPLBACKEND="agg"):
            invent("bench", runs)
            # Not measured: the first drawing imports libraries and finds fonts.
            executed, _, _ = draw_all("bench", folder / "warm")
            measured = [draw_all("bench", folder / "figures")[1:] for _ in range(max(3, options.repeats // 5))]
            took, reading = np.array(measured).T
            note, name = f"{len(executed)} notebooks, {runs} runs", f"report of {runs} runs, warm interpreter"
            yield figure("report", f"{name}: all figures", took, 30.0, unit="s", note=note)
            yield figure("report", f"{name}: reading its data", reading, 1.0, unit="s", note=note)
            if command:
                page = ("workbench.report", "--study", "bench", "--out", str(folder / "page"))
                whole = seconds(lambda: run_command(*page, quiet=True))
                note = "a kernel a notebook"
                yield figure("report", "python -m workbench.report", [whole], None, unit="s", note=note)


def draw_all(study: str, out: Path) -> tuple[list[str], float, float]:
    """Execute the code of all notebooks in this process, as if a person did.

    Returns:
        The notebooks whose runs the study has; seconds of all, and of these the reading of data.
    """
    begin, done = time.perf_counter(), []
    reads = ("load_runs", "load_history", "load_samples", "load_sheets")
    with stopwatch(tracking, *reads) as runs, stopwatch(results, "open_search", "read") as search:
        for path in sorted(shipped("notebooks").glob("*.ipynb")):
            try:
                execute_cells(nbformat.read(path, as_version=4), {"study": study, "out": str(out)})
                done.append(path.stem)
            except UserError:  # the study has no such runs
                pass
    return done, time.perf_counter() - begin, sum((runs | search).values())


def execute_cells(notebook: nbformat.NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook's code in this process.

    Args:
        parameters: in place of its defaults, by name.
    """
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda shown: None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib: the figures are not shown
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                # After the cell of defaults, where papermill puts the given values.
                names |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}
    plt.close("all")
