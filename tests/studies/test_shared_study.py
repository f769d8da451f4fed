"""Several commands on one study, as the tasks of a cluster's array are."""

import os
import re
import subprocess
import sys

import click
import pytest
import yaml
from optuna import load_study

from tests.support.helpers import ROOT, overrides, workbench
from workbench import sweep

CLUSTER = sorted((ROOT / "experiments" / "cluster").iterdir())
ARMS = """
[sweep]
trials = 0
objective = "validation/accuracy"
[sweep.arms]
one = {}
two = { "reference.policy" = "update" }
three = { "reference.policy" = "frozen" }
four = { "reference.interval" = 1 }
"""


@pytest.mark.slow  # in every run: eight commands that start at once, in test_survival.py
def test_each_arm_is_run_once_however_many_commands_share_the_study(tiny, workplace):
    (workplace / "shared.toml").write_text(ARMS)
    quick = overrides(tiny | {"evaluation.seeds": 0, "evaluation.grid": 0})
    made = workbench("workbench.sweep", "shared.toml", "--init", *quick, cwd=workplace)
    assert made.returncode == 0 and "4 trials are waiting" in made.stderr + made.stdout, made.stderr
    command = [sys.executable, "-m", "workbench.sweep", "shared.toml", "--workers", "1", *quick]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, cwd=workplace, env=environment, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    trials = load_study(study_name="shared", storage=f"sqlite:///{workplace / 'optuna.db'}").get_trials()
    assert sorted(t.user_attrs["arm"] for t in trials) == ["four", "one", "three", "two"]
    assert all(t.state.name == "COMPLETE" for t in trials)


@pytest.mark.parametrize("path", CLUSTER, ids=lambda p: p.name)
def test_cluster_files_use_options_that_there_are(path):
    commands = {"sweep": sweep.main}
    for text in re.findall(r"workbench\.sweep[^#\n]*", path.read_text()):
        options = {o for p in commands["sweep"].params if isinstance(p, click.Option) for o in p.opts}
        assert set(re.findall(r"--[a-z-]+", text)) <= options
    if path.suffix == ".yaml":
        yaml.safe_load(path.read_text())
