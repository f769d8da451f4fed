"""What `import workbench as wb` offers, by the examples of its page."""

import re
import subprocess
import sys

import polars as pl
import pytest

import workbench as wb
from tests.support.helpers import ROOT
from tests.support.studies import Events, made
from workbench.common.errors import UserError
from workbench.studies import lifecycle, workers

PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def default(workplace, tiny, monkeypatch):
    """A study `default` of two arms, run in this process."""
    arms = {"frozen": {"reference.policy": "frozen"}, "threshold": {}}
    study, client, assignment = made(tiny | {"sweep.trials": 2, "sweep.arms": arms}, "default")
    workers.run_trials(assignment, Events(), lambda: False)
    lifecycle.finish_study(study, client, assignment.parent, assignment.experiment)


def test_the_examples_of_its_page_run(default, tmp_path):
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    runs, best = names["runs"], names["best"]
    assert runs.schema["train.lr"] == pl.Float64 and runs.schema["reference.interval"] == pl.Int64
    assert runs.schema["data.flip"] == pl.Boolean and runs.schema["reference.policy"] == pl.String
    assert runs.schema["eval/reward"] == pl.Float64 and sorted(runs["arm"]) == ["frozen", "threshold"]
    row = runs.filter(pl.col("run_id") == best.run_id)
    assert best.values == {"eval/win_rate": row["eval/win_rate"][0]} and best.name == row["arm"][0]
    assert names["difference"].seeds == 1 and names["difference"].low == names["difference"].mean
    assert names["curve"]["step"].max() == 4 and names["worst"].height == 4 and names["sheet"].shape[2] == 3
    assert (tmp_path / "trained" / "model_index.json").is_file()
    assert names["trained"].history["step"].to_list()[-1] == 2
    assert wb.list_studies().rows() == [("default", "complete", 2)]
    assert wb.trials("default")["state"].to_list() == ["complete"] * 2


def test_each_name_of_its_page_is_there_and_no_other():
    assert set(re.findall(r"`wb\.(\w+)\(", PAGE.split("## What came")[0])) | {"__version__"} == set(wb.__all__)
    assert all(getattr(wb, name).__doc__ for name in wb.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        wb.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys, workbench; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'polars', 'mlflow'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_mistakes_are_one_line(workplace):
    with pytest.raises(UserError, match=r"train\.stepz: unknown setting \(did you mean train\.steps\?\)"):
        wb.config(train__stepz=3)
    with pytest.raises(UserError, match="study 'default': no study yet"):
        wb.best_trial("default")
