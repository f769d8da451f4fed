"""The study that figures are timed on."""

import shutil

import nbformat
import pytest

from workbench import tracking
from workbench.benchmarks import report
from workbench.benchmarks.invented_study import invent
from workbench.benchmarks.report import draw_all, execute_cells
from workbench.benchmarks.sandbox import databases, sandbox
from workbench.common.paths import shipped
from workbench.tracking import study_runs


@pytest.mark.parametrize("runs", [22, pytest.param(4, marks=pytest.mark.slow)])
def test_an_invented_study_suits_the_notebooks(runs, tmp_path, empty_store, monkeypatch):
    in_one_format = lambda notebook, given: execute_cells(notebook, given | {"formats": "png"})  # noqa: E731
    monkeypatch.setattr(report, "execute_cells", in_one_format)  # other formats take as long again
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    stores = {name: databases(tmp_path)[name] for name in ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE")}
    with sandbox(tmp_path, **stores, MPLBACKEND="agg"):
        invent("bench", runs, steps=16)
        assert len(tracking.load_runs("bench")) == runs
        done, took, reading = draw_all("bench", tmp_path / "figures")
    every = sorted(path.stem for path in shipped("notebooks").glob("*.ipynb") if path.stem != "rounds")
    assert done == (
        every if runs > 20 else ["divergence", "explore", "imbalance", "methods", "parts", "search", "tradeoff"]
    )
    assert 0 < reading < took and (tmp_path / "figures" / "search.png").is_file()


def test_the_notebook_of_rounds_suits_invented_rounds(workplace):
    client = tracking.connect()
    parent = study_runs.open_group(client, "r", "").info.run_id
    for number in (1, 2):
        about = {"workbench.kind": "run", "workbench.study": "r", "workbench.arm": f"r-round-{number}"}
        params = {"rounds.count": 2, "seed": 0}
        run = tracking.Tracker(client, f"r-round-{number}", params=params, tags=about, parent=parent)
        run.log(1, {"divergence/policy": 0.01 * number, "validation/margin": 0.1})
        scores = {"reward": [0.5 * number - 1] * 2, "pretrained_reward": [-1.0, -1.0]}
        run.table("samples.json", {"caption": ["a fox", "a car"], "seed": [0, 0]} | scores)
        run.close("complete")
    notebook = nbformat.read(shipped("notebooks") / "rounds.ipynb", as_version=4)
    execute_cells(notebook, {"study": "r", "out": str(workplace / "figures"), "formats": "png"})
    table = (workplace / "figures" / "rounds-table.md").read_text()
    assert [row.split("|")[1:3] for row in table.splitlines()[2:5]] == [
        [" 0 ", " 0.000 "], [" 1 ", " 0.500 "], [" 2 ", " 1.000 "],
    ]  # fmt: skip
    assert (workplace / "figures" / "rounds.png").stat().st_size > 10_000
