"""Where a run's time goes: parts of a run of a few steps against the clock, and what it imports."""

import subprocess
import time
from importlib import import_module

import pytest
import torch

from workbench.benchmarks import parts, sandbox
from workbench.benchmarks.figure import Options
from workbench.training.experiment_file import load

IMPORTS = 1000.0  # what the stand-in says; a real run takes seconds


def test_the_parts_add_up_to_what_the_clock_says_and_nothing_is_printed(tiny, workplace, monkeypatch, capsys):
    """A run first, one later, one of the study's, on the options' device; slow imports have a stand-in."""
    clocks, devices, real = [], [], parts.timed_run

    def timed_run(config, *told):
        devices.append(config.model.device)
        began = time.perf_counter()
        found = real(config, *told)
        clocks.append((time.perf_counter() - began + IMPORTS, found))
        return found

    monkeypatch.setattr(parts, "timed_run", timed_run)
    monkeypatch.setattr(parts, "import_seconds", lambda needed: IMPORTS)
    options = Options(5, torch.device("cpu"), workplace / "out" / "work", sweeps=1)
    figures = {one.name: one for one in parts.parts(options, tiny | {"model.device": "elsewhere"})}
    assert devices == ["cpu"] * 3 and capsys.readouterr().out == ""
    for whole, found in clocks:
        assert list(found) == list(parts.PARTS) and min(found.values()) >= 0
        # What is between the clocks takes no time: the stopwatches are wound up and taken off.
        assert sum(found.values()) == pytest.approx(whole, abs=0.5)
        assert found["imports"] == IMPORTS and found["training steps"] > 0 and found["final samples"] > 0
    (_, first), *_ = clocks
    of_training = sum(first[part] for part in parts.OF_TRAINING)
    outside = figures["the first run, time outside of training"]
    assert outside.median == pytest.approx(100 * (1 - of_training / sum(first.values()))) and outside.goal is None
    assert figures["a later run, time outside of training"].goal == 15
    assert figures["a trial of the default study, time outside of training"].goal is None
    assert (workplace / "out" / "parts.png").stat().st_size > 1000


def test_the_imports_name_the_classes_of_the_models_parts():
    """Those of the small model, without the ones that it leaves out."""
    found = parts.imports_of(load(None, {}))
    assert {("diffusers", "UNet2DConditionModel"), ("diffusers", "AutoencoderKL"), ("transformers", "CLIPTextModel"),
            ("diffusers", "StableDiffusionPipeline"), ("workbench", "tracking")} < {*found}  # fmt: skip
    for module, name in found:
        assert hasattr(import_module(module), name)


def test_a_process_that_imports_finds_this_checkout(tmp_path, monkeypatch):
    """From a folder in which it would find an installed package, or none."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "only_there.py").write_text("name = 1")
    monkeypatch.setattr(sandbox, "PACKAGE", tmp_path / "checkout" / "workbench")
    monkeypatch.chdir(tmp_path)
    assert parts.import_seconds([("only_there", "name")]) > 0
    with pytest.raises(subprocess.CalledProcessError):
        parts.import_seconds([("only_there", "another_name")])
