"""Settings by which runs follow published recipes: caption dropout, sizes, schedules, noise, checkpoints on the way."""

from pathlib import Path
from typing import get_args

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import runs
from tests.support.ended import Ended
from tests.training.test_loop import PROCESS, batch
from workbench.common.errors import UserError
from workbench.models import load
from workbench.training.config import resolve
from workbench.training.loop import noised
from workbench.training.optimizers import schedule_of
from workbench.training.preparation import Preparations, open_pairs
from workbench.training.snapshots import Snapshots, require_same
from workbench.training.tables import Schedule

CPU = torch.device("cpu")
CHEAP = {"evaluation.seeds": 0, "evaluation.grid": 0, "diagnostics.draws": 1}

#: What runs of the same model and data share, which none of them changes: it is made once for all tests.
PREPARATIONS = Preparations(keep=4)


def run(settings, listener=None, **how):
    config = resolve(settings)
    return runs.run(config, listener, PREPARATIONS(config), **how)


def ended(settings, **how):
    found = Ended()
    run(settings, found, **how)
    return found


def resumed(settings, stop):
    """The same run, ended without a word after a step and gone on with."""
    snapshots = Snapshots(Path("s"), 1)

    def on_step(step, news):
        if step == stop:
            raise SystemExit

    with pytest.raises(SystemExit):
        run(settings, Ended(), snapshots=snapshots, on_step=on_step)
    return ended(settings, snapshots=snapshots)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"data.caption_dropout": 0.5, "train.accumulation": 2}, id="dropout"),
        pytest.param({"data.caption_dropout": 0.5, "data.cache": False}, id="streamed", marks=pytest.mark.slow),
        pytest.param({"train.ema": 0.5, "evaluation.seeds": 1}, id="ema"),
        pytest.param(
            {"train.noise_offset": 0.1, "train.input_perturbation": 0.1, "train.schedule": "cosine"}, id="noise"
        ),
    ],
)
def test_a_recipes_run_changes_and_resumes_to_the_same_bits(changes, tiny, workplace):
    settings = tiny | CHEAP | {"train.keep": True} | changes
    whole = ended(settings)
    assert whole == resumed(settings, 2)
    plain = ended({k: v for k, v in settings.items() if k not in changes or k in ("data.cache", "evaluation.seeds")})
    if "train.ema" in changes:  # the policy itself is the same, what it is evaluated and saved as is not
        assert whole.metrics[3] == plain.metrics[3]
        assert whole.weights != plain.weights and whole.tables["samples.json"] != plain.tables["samples.json"]
    else:
        assert whole.metrics[4]["train/loss"] != plain.metrics[4]["train/loss"]


def test_all_captions_dropped_is_training_on_the_empty_caption(tiny, workplace):
    import polars as pl

    frame = pl.read_parquet(tiny["data.train"]).with_columns(caption=pl.lit(""))
    frame.write_parquet("empty.parquet")
    settings = tiny | CHEAP | {"data.validation": "empty.parquet", "reference.policy": "frozen"}
    settings.pop("reference.interval")
    ours = ended(settings | {"data.caption_dropout": 1.0})
    theirs = ended(settings | {"data.train": "empty.parquet"})
    for step in range(1, 5):
        assert ours.metrics[step]["train/loss"] == pytest.approx(theirs.metrics[step]["train/loss"], abs=1e-6)


def test_sdxl_is_told_the_resolution_or_the_images_own_size(checkpoint, tiny_pairs, workplace):
    backend = load(str(checkpoint("sdxl")), CPU, resolution=64)
    ids = {}
    for sizes in ("original", "resolution"):
        data = resolve({"data.train": str(tiny_pairs), "data.sizes": sizes}).data
        for split in ("train", "validation"):
            data = data.model_copy(update={"validation": str(tiny_pairs)})
            pairs = open_pairs(data, split, backend)
            ids[sizes] = pairs.gather(torch.tensor([0]), CPU).condition["time_ids"][0].tolist()
            edge = 32.0 if sizes == "original" else 64.0
            assert ids[sizes] == [edge, edge, 0, 0, 64, 64]
    streamed = data.model_copy(update={"cache": False})
    first = next(open_pairs(streamed, "train", backend).batches(2, torch.Generator(), CPU))
    assert first.condition["time_ids"].tolist() == [ids["resolution"]] * 2


def rates(schedule):
    """Of ten steps."""
    found = []
    for _ in range(10):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", sorted({*get_args(Schedule)} - {"warmup"}))
def test_schedules_are_diffusers(name):
    from diffusers.optimization import get_scheduler

    optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0) for _ in range(2)]
    ours = schedule_of(name, optimizers[0], 3, 10)
    theirs = get_scheduler(name, optimizers[1], num_warmup_steps=3, num_training_steps=10)
    assert rates(ours) == rates(theirs) and max(rates(theirs)) <= 2.0


def test_our_warmup_begins_above_0_and_is_constant_afterwards():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    assert rates(schedule_of("warmup", optimizer, 3, 10))[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_perturbation_is_added_to_the_noise_of_x_t_and_not_to_the_target():
    b, t, eps, more = batch(), torch.tensor([0, 5, 10, 19]), torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    ours, plain = noised(b, t, eps, PROCESS, more), noised(b, t, eps, PROCESS)
    assert torch.equal(ours.target, plain.target)
    scale = PROCESS.noise[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(ours.x_t - plain.x_t, torch.cat([scale * more] * 2))


class Kept(Ended):
    """A listener that keeps the steps of checkpoints, and the weights of the last."""

    def __init__(self):
        super().__init__()
        self.checkpoints = {}

    def artifact(self, path, folder=None):
        self.checkpoints[folder] = {str(f.relative_to(path)): load_file(f) for f in path.rglob("*.safetensors")}

    def remove(self, folder):
        del self.checkpoints[folder]


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpoints_on_the_way_are_the_policy_of_their_step(rank, tiny, workplace):
    settings = tiny | CHEAP | {"lora.rank": rank, "train.steps": 6}
    kept = Kept()
    run(settings | {"train.checkpoint_every": 2, "train.checkpoints_kept": 2}, kept)
    assert sorted(kept.checkpoints) == ["checkpoints/000004", "checkpoints/000006"]
    run(settings | {"train.steps": 4}, save_to=Path("four"))
    for file, weights in kept.checkpoints["checkpoints/000004"].items():
        expected = load_file(Path("four") / file)
        assert all(torch.equal(x, expected[name]) for name, x in weights.items())


def test_a_kept_checkpoint_is_loaded_by_diffusers(tiny, workplace):
    class Copied(Kept):
        def artifact(self, path, folder=None):
            self.model = diffusers.UNet2DConditionModel.from_pretrained(path / "unet")

    found = Copied()
    run(tiny | CHEAP | {"train.steps": 2, "train.checkpoint_every": 2}, found)
    assert isinstance(found.model, diffusers.UNet2DConditionModel)


def test_a_run_stops_with_a_snapshot_when_its_hours_are_over(tiny, workplace):
    snapshots = Snapshots(Path("s"), 0)
    with pytest.raises(KeyboardInterrupt):
        run(tiny | CHEAP | {"train.max_hours": 1e-9}, snapshots=snapshots)
    assert snapshots.steps() == []  # no step was done
    clock = {"train.max_hours": 1000.0}
    assert ended(tiny | CHEAP | clock).metrics == ended(tiny | CHEAP).metrics


def test_the_average_that_is_saved_is_diffusers(tiny, workplace):
    """Step by step from the checkpoints of a run without an average."""
    from diffusers.training_utils import EMAModel

    class Steps(Kept):
        def __init__(self):
            super().__init__()
            self.models = []

        def artifact(self, path, folder=None):
            self.models.append(diffusers.UNet2DConditionModel.from_pretrained(path / "unet"))

    plain = Steps()
    run(tiny | CHEAP | {"train.checkpoint_every": 1}, plain)
    start = diffusers.UNet2DConditionModel.from_pretrained(Path(tiny["model.path"]) / "unet")
    average = EMAModel(start.parameters(), decay=0.3)
    for model in plain.models:
        average.step([p.requires_grad_(True) for p in model.parameters()])
    average.copy_to(start.parameters())
    run(tiny | CHEAP | {"train.ema": 0.3}, save_to=Path("out"))
    saved = diffusers.UNet2DConditionModel.from_pretrained("out/unet")
    for ours, theirs in zip(saved.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_what_a_run_leaves_on_its_way_may_change_when_it_goes_on_and_a_falling_rates_end_may_not():
    stored = resolve({"train.schedule": "cosine"}).flat()
    require_same(stored, stored | {"train.max_hours": 2.0, "train.checkpoint_every": 5}, "x")
    with pytest.raises(UserError, match=r"train\.steps = 999: the snapshot of x was made with .* rate depends"):
        require_same(stored, stored | {"train.steps": 999}, "x")
    constant = resolve({}).flat()
    require_same(constant, constant | {"train.steps": 999}, "x")
