"""The real models' experiment files on tiny checkpoints of their formats, and the files for clusters and GPUs."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from tests.support.helpers import ROOT
from tests.support.runs import run
from workbench import models
from workbench.studies.experiment import Experiment
from workbench.training.config import known_names, merge
from workbench.training.experiment_file import load, read
from workbench.training.preparation import Preparations

EXPERIMENTS = ROOT / "experiments"
BOTH = [EXPERIMENTS / f"{family}{variant}.toml" for family in ("sd15", "sdxl", "sd3") for variant in ("", "-lora")]
LARGE = [EXPERIMENTS / f"{name}-lora.toml" for name in ("flux1", "flux2-klein", "qwen-image", "z-image", "sana")]
REAL = [*BOTH, *LARGE]
SCRIPTS = sorted([*EXPERIMENTS.rglob("*.sbatch"), *EXPERIMENTS.rglob("*.sh")])
PODS = sorted(EXPERIMENTS.rglob("*.yaml"))


def quick(checkpoint, pairs):
    """What a run of two steps changes: where things lie, and how much of everything."""
    return {
        "model.path": str(checkpoint), "model.resolution": 32, "data.train": str(pairs), "data.validation": str(pairs),
        "train.steps": 2, "train.batch_size": 2, "train.accumulation": 2, "reference.interval": 1,
        "diagnostics.interval": 2, "diagnostics.pairs": 4, "diagnostics.probe": 4, "train.warmup": 0,
    }  # fmt: skip


#: All eleven files would take minutes. In every run: two whole denoisers, of noise (SD1.5) and of flow (SD3), which is
#: in SDXL's place, as that trains like SD1.5; and adapters for SD3 and FLUX.1. The rest is slow, but each family trains
#: in every run of tests/models.
OFTEN = ("sd15", "sd3", "sd3-lora", "flux1-lora")
TRAINED = [pytest.param(p, marks=[] if p.stem in OFTEN else [pytest.mark.slow]) for p in REAL]


@pytest.mark.parametrize("path", TRAINED, ids=lambda p: p.stem)
def test_every_real_models_file_trains_two_steps(path, checkpoint, tiny_pairs, workplace):
    """The whole method, and the arm that differs from it most; the arms between differ by numbers."""
    settings = read(path)
    base = merge(settings, quick(checkpoint(settings["model.family"]), tiny_pairs))
    arms = {arm.name: arm.config for arm in Experiment.resolve(base).arms}
    preparations = Preparations()
    for arm in ("ours", "frozen"):
        config = arms[arm]
        final = run(config, prepared=preparations(config))
        assert np.isfinite(list(final.values())).all() and config.sweep.objective in final
        assert final["reference/updates"] == (0 if arm == "frozen" else pytest.approx(1, abs=1))


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_every_arm_of_a_real_models_file_resolves(path):
    arms = {arm.name: arm.config for arm in Experiment.resolve(read(path)).arms}
    assert {"ours", "frozen"} < set(arms)
    for policy in ("update", "threshold"):
        for interval in (16, 32, 64):
            config = arms[f"{policy}-{interval}"]
            assert (config.reference.policy, config.reference.interval) == (policy, interval)
            assert config.reward_scale.shape == "constant"
    assert (arms["ours"].timesteps.gamma, arms["ours"].reward_scale.shape) == (0.9, "inverse_sqrt_snr")


def test_the_papers_settings_are_in_the_files():
    for family, delta in (("sd15", 0.005), ("sdxl", 0.002)):
        config = load(EXPERIMENTS / f"{family}.toml")
        train = config.train
        assert train.batch_size * train.accumulation == 2048 and train.lr == 1e-8 and train.scale_lr
        assert (config.objective.beta, config.reference.delta) == (5000, delta)
        assert config.data.validation == "yuvalkirstain/pickapic_v2:validation"
    for path in REAL:
        config = load(path)
        assert bool(config.lora.rank) == path.stem.endswith("lora")
        assert config.model.dtype == "bfloat16" and config.train.keep
        assert config.evaluation.seeds == config.evaluation.grid == 0


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_every_setting_says_where_it_comes_from(path):
    text = path.read_text()
    arms, table = False, ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.split("]")[0] + "]"
        arms = table == "[sweep.arms]"
        if "=" in line and not line.startswith("#") and not arms:
            assert re.search(r"# +(paper|public Diffusion-DPO code|diffusers' |ours|real models)", line), line
    head = text.split("\n[")[0]
    assert "from FLOPs and not measured" in head and "GPU-hours" in head and "GB of weights" in head


def test_the_files_name_checkpoints_of_the_family_that_they_expect():
    assert {load(path).model.family for path in REAL} == set(models.FAMILIES)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PODS, ids=lambda p: p.name)
def test_jobs_for_kubernetes_are_yaml_that_inlines_no_secret(path):
    job = yaml.safe_load(path.read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for variable in container["env"]:
            secret = variable["name"] in ("WORKBENCH_STORAGE", "MLFLOW_TRACKING_URI", "HF_TOKEN")
            assert secret == ("valueFrom" in variable)


@pytest.mark.parametrize("path", [*SCRIPTS, *PODS, *REAL], ids=lambda p: p.name)
def test_commands_settings_and_files_that_are_named_exist(path):
    text = path.read_text()
    for module in re.findall(r"workbench\.([a-z_]+)", text):
        assert (ROOT / "workbench" / f"{module}.py").is_file(), module
    for name in re.findall(r"--set \"?([a-z_]+\.[a-z_]+)=", text):
        assert name in known_names(), name
    for file in re.findall(r"experiments/[\w./-]+\.(?:toml|sbatch|yaml|sh)", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.slow
def test_the_gpu_script_runs_all_its_steps_on_a_cpu(tmp_path):
    """The tiny shape in place of the real ones."""
    settings = {
        "SMALL": "tiny",
        "LARGE": "tiny",
        "PART": "tiny",
        "DEVICE": "cpu",
        "STEPS": "4",
        "LARGE_STEPS": "4",
        "MANY_STEPS": "8",
        "PATIENCE": "10",
    }
    settings |= {"TRAIN_OPTIONS": "--set train.steps=2 --set evaluation.seeds=0 --set evaluation.grid=0"}
    done = subprocess.run(
        ["bash", ROOT / "experiments" / "gpu.sh", "2000"],
        cwd=tmp_path, env=os.environ | settings | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=2000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "reports" / "gpu" / "summary.md").read_text()
    assert summary.count("| tiny |") >= 4 and summary.count("done in") == 14 and "**total**" in summary


def test_the_gpu_script_says_what_it_had_no_time_for(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "experiments" / "gpu.sh", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout.count("not run, no time left") >= 10
    assert subprocess.run(["bash", ROOT / "experiments" / "gpu.sh", "soon"], capture_output=True).returncode == 2


@pytest.mark.parametrize("name", ["train", "study"])
def test_a_job_waits_for_its_run_to_clean_up(name, tmp_path):
    """SLURM kills what is left as soon as the script ends."""
    text = (EXPERIMENTS / "cluster" / f"{name}.sbatch").read_text()
    (tmp_path / "run.py").write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n    time.sleep(1); open('clean', 'w').close(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop); open('started', 'w').close(); time.sleep(60)\n"
    )
    (tmp_path / "job.sh").write_text(f"set -euo pipefail\n{sys.executable} run.py &\n{text[text.index('child=$!') :]}")
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=60) == 130 and (tmp_path / "clean").exists()
