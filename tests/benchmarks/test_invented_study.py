"""The study that figures are timed on."""

import shutil

import pytest

from workbench import tracking
from workbench.benchmarks.invented_study import invent
from workbench.benchmarks.report import draw_all
from workbench.benchmarks.sandbox import databases, sandbox
from workbench.common.paths import shipped


@pytest.mark.parametrize("runs", [22, pytest.param(4, marks=pytest.mark.slow)])
def test_an_invented_study_suits_the_notebooks(runs, tmp_path, empty_store):
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
