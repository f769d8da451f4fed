import gc
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.support.runs import run
from workbench.common.errors import UserError
from workbench.method.objectives import OBJECTIVES
from workbench.method.reference import RULES
from workbench.studies.experiment import Experiment
from workbench.training.build import build
from workbench.training.config import merge, resolve
from workbench.training.experiment_file import read
from workbench.training.measurements import metric_names
from workbench.training.preparation import Preparations, prepare
from workbench.training.run import check

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
SMALL = [path for path in EXPERIMENTS if "model.path" not in read(path)]  # the others: test_experiments.py


class Notes:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.metrics, self.images, self.pictures, self.tables = {}, {}, {}, {}

    def log(self, step, metrics):
        self.metrics.setdefault(step, {}).update(metrics)

    def image(self, key, step, pixels):
        self.images[step] = pixels

    def picture(self, file, pixels):
        self.pictures[file] = pixels

    def table(self, file, columns):
        self.tables[file] = columns


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem == "claims-long" else []) for p in SMALL],
)
def test_every_arm_of_every_experiment_runs_two_steps(path, tiny, workplace):
    scored = workplace / "scored.parquet"  # some arms learn from how far apart the two images of a pair are
    pairs = pl.read_parquet(tiny["data.train"])
    pairs.with_columns(reward_0=pl.col("label_0"), reward_1=pl.col("label_1")).write_parquet(scored)
    quick = tiny | {"train.steps": 2, "evaluation.grid": 0, "evaluation.seeds": 0}
    quick |= {"data.train": str(scored), "data.validation": str(scored)}
    quick.pop("reference.interval")
    arms = {arm.name: arm.config for arm in Experiment.resolve(merge(read(path), quick)).arms}
    assert arms
    preparations = Preparations()
    for config in arms.values():
        notes = Notes()
        run(config, notes, preparations(config))
        assert sorted(notes.metrics) == [1, 2]


@pytest.fixture(scope="module")
def preparations():
    """What runs share that differ in nothing but the method, made by the first test and kept in memory for all."""
    return Preparations()


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_objective_runs_with_every_reference_policy_and_timestep_aware(
    loss, policy, tiny, preparations, workplace
):
    chosen = {"objective.loss": loss, "reference.policy": policy}
    aware = {"timesteps.density": "discounted", "reward_scale.shape": "inverse_sqrt_snr"}
    cheap = {"train.steps": 2, "evaluation.seeds": 0, "evaluation.grid": 0, "diagnostics.draws": 1}
    config = resolve(merge(tiny | cheap, chosen | aware | {"data.prompts": "embedded"}))
    notes = Notes()
    final = run(config, notes, preparations(config))
    assert np.isfinite(list(final.values())).all()
    assert notes.metrics[2]["train/loss"] != notes.metrics[1]["train/loss"]


def test_a_run_logs_what_it_says_it_logs(tiny, workplace):
    notes = Notes()
    config = resolve(tiny)
    check(config, prepare(config))
    final = run(config, notes)
    assert metric_names(config) == set(final)
    assert set(notes.images) == {0, 2, 4} and notes.images[0].shape == notes.images[4].shape
    assert notes.tables["reference_audit.json"]["step"] == [2, 4]
    assert len(notes.tables["samples.json"]["reward"]) == 4
    assert notes.pictures["samples.png"].shape == (32, 4 * 32, 3)  # a row a seed, a column a prompt
    assert notes.metrics[4]["divergence/policy"] == pytest.approx(notes.tables["reference_audit.json"]["divergence"][1])


def test_the_same_seed_gives_the_same_run_and_another_another(tiny, workplace):
    losses = []
    for seed in (0, 0, 1):
        notes = Notes()
        run(tiny | {"seed": seed}, notes)
        losses.append([notes.metrics[s]["train/loss"] for s in sorted(notes.metrics)])
    assert losses[0] == losses[1] != losses[2]


def test_a_run_that_is_stopped_still_tells_what_the_reference_did(tiny, workplace):
    notes = Notes()

    def stop(step, news):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, notes, on_step=stop)
    assert notes.tables["reference_audit.json"]["step"] == [2]


def test_the_first_picture_is_the_pretrained_models(tiny, workplace):
    notes = Notes()
    run(tiny | {"train.lr": 1e-12}, notes)
    assert np.abs(notes.images[0].astype(int) - notes.images[4].astype(int)).max() <= 2


def denoisers() -> int:
    from diffusers import UNet2DConditionModel

    gc.collect()
    whole = (o for o in gc.get_objects() if type(o) is UNet2DConditionModel)
    return sum(not p.is_meta for o in whole for p in [next(o.parameters())])


@pytest.mark.parametrize(("rank", "expected"), [(0, 2), (2, 1)])
def test_a_full_run_holds_two_denoisers_and_lora_one(tiny, workplace, rank, expected):
    config = resolve(tiny | {"lora.rank": rank})
    before = denoisers()
    prepared = prepare(config)
    assert denoisers() == before  # the pretrained model's errors are kept, it is not
    training = build(config, prepared.backend, prepared.train, prepared.probe)
    next(training.records)
    assert denoisers() - before == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_half_precision_trains_with_errors_in_float32(tiny, workplace, dtype, rank):
    steps = 16  # float16 leaves out the first, until its scale fits
    settings = {"model.dtype": dtype, "lora.rank": rank, "train.steps": steps, "reference.delta": 1.0}
    notes = Notes()
    run(tiny | settings | {"evaluation.seeds": 0, "evaluation.grid": 0}, notes)
    margins = [notes.metrics[step]["rewards/margins"] for step in range(1, steps + 1)]
    assert not any(margins[::2])  # a hard copy every second step
    assert any(margins[11::2]) if dtype == "float16" else all(margins[1::2])
    assert 0.4 < notes.metrics[steps]["train/loss"] < 1.2  # log 2 where the reference has just moved


def test_a_float16_step_whose_gradients_overflow_is_left_out(tiny, workplace):
    from workbench.training.loop import as_floats

    config = resolve(tiny | {"model.dtype": "float16", "train.steps": 8, "objective.beta": 1e6})
    prepared = prepare(config)
    training = build(config, prepared.backend, prepared.train, prepared.probe)
    rows = as_floats(list(training.records))
    assert len(rows) == 8 and all(np.isfinite(row["train/loss"]) for row in rows)


def test_prompts_that_the_reward_cannot_judge_can_be_drawn(tiny, workplace):
    (workplace / "free.txt").write_text("a photograph of an astronaut\n")
    free = tiny | {"data.prompts": str(workplace / "free.txt"), "train.steps": 2}
    with pytest.raises(UserError, match=r"cannot judge this prompt .*set evaluation\.seeds=0"):
        prepare(resolve(free))
    notes = Notes()
    run(free | {"evaluation.seeds": 0}, notes)
    assert notes.images[2].shape[2] == 3
