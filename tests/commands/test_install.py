"""A plain installation: what the wheel holds, what is found in it, and the one command with all the others below it."""

import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module

import click
import pytest
from click.testing import CliRunner

import workbench
from tests.support.helpers import ROOT
from workbench.__main__ import main
from workbench.common.command_line import experiment_argument
from workbench.common.paths import shipped


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a plain installation unpacks from the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files(folder):
    """Files below a folder by relative path, without what Python and Jupyter leave there."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}


def test_the_wheel_holds_code_and_small_model_and_experiments_and_notebooks(installed):
    package = installed / "workbench"
    for folder in ("experiments", "notebooks"):
        assert files(package / "shipped" / folder) == files(ROOT / folder)
    assert {path for path in files(package) if path.parts[0] != "shipped"} == files(ROOT / "workbench")
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"workbench"}
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert "workbench = workbench.__main__:main" in scripts.read_text()


def test_installed_commands_find_their_files_from_any_folder(installed, tmp_path):
    code = """
from pathlib import Path
from workbench import sweep, throughput
from workbench.analysis.claims import run as claims
from workbench.analysis.report import NOTEBOOKS
from workbench.benchmarks import scale
from workbench.training.experiment_file import read
from workbench.training.provenance import provenance
for path in (claims.DEFAULT, scale.EXPERIMENT, sweep.DEFAULT, throughput.EXPERIMENTS / "sd15.toml"):
    read(path)
assert not [tag for tag in provenance() if tag.startswith("git.")]
print(len([*NOTEBOOKS.glob("*.ipynb")]))
print(Path(sweep.__file__).parent)
"""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    notebooks = len([*(ROOT / "notebooks").glob("*.ipynb")])
    assert done.stdout.splitlines() == [str(notebooks), str(installed / "workbench")]


def test_an_experiment_of_the_workbench_is_found_where_the_folder_has_none_of_that_name(tmp_path, monkeypatch):
    command = click.command()(experiment_argument(lambda experiment: click.echo(experiment)))
    monkeypatch.chdir(tmp_path)

    def taken(path):
        return CliRunner().invoke(command, [path]).output.strip()

    assert taken("experiments/sd15.toml") == str(shipped("experiments/sd15.toml"))
    assert taken("experiments/mine.toml") == "experiments/mine.toml"
    assert taken("sd15.toml") == "sd15.toml"
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "sd15.toml").touch()
    assert taken("experiments/sd15.toml") == "experiments/sd15.toml"


def test_subcommands_are_the_modules_beside_the_packages():
    modules = {found.name for found in pkgutil.iter_modules(workbench.__path__) if not found.ispkg} - {"__main__"}
    listed = main.list_commands(click.Context(main))
    assert sorted(listed) == sorted(modules)
    for name in listed:
        assert main.get_command(click.Context(main), name) is import_module(f"workbench.{name}").main
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert set(contracts[0]["layers"][1].split(" | ")) == modules


def test_the_one_command_lists_all_and_hands_over_to_each():
    listed = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {name} " in listed for name in main.list_commands(click.Context(main)))
    below = CliRunner().invoke(main, ["sweep", "--help"])
    alone = CliRunner().invoke(import_module("workbench.sweep").main, ["--help"])
    assert below.exit_code == 0 and below.output.splitlines()[1:] == alone.output.splitlines()[1:]
    assert CliRunner().invoke(main, ["swep"]).exit_code == 2


def test_the_list_of_commands_is_there_at_once():
    code = (
        "import sys; from workbench.__main__ import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = set(done.stdout.splitlines()[-1].split())
    assert not {"torch", "mlflow", "optuna", "polars", "diffusers", "papermill"} & imported


def test_make_ui_prints_a_link(empty_store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}")
    monkeypatch.setattr("workbench.tracking.ui.PORT", 5000)  # which the line sets
    (code,) = re.findall(r"python -c '(.*ui_link.*)'$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    exec(code.replace("$(PORT)", "5007"), {})
    assert "Open: http://127.0.0.1:5007/#/experiments/" in capsys.readouterr().out
