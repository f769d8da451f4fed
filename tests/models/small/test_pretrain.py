import itertools

import pytest
import torch
from torch import nn

from workbench.common.errors import UserError
from workbench.models.small import artwork, faults, image_models, quality, stages
from workbench.models.small.artwork import Artwork, Drawings
from workbench.models.small.autoencoder import new_autoencoder
from workbench.models.small.denoiser import every_caption, new_scheduler
from workbench.models.small.fit import fit
from workbench.models.small.muon import optimizers, orthogonalised
from workbench.models.small.prompts import CONCEPTS, STYLES
from workbench.models.small.quality import calibration_error

SIZE = artwork.SIZE


@pytest.fixture(scope="module")
def art() -> Artwork:
    """A square of a colour of its own for every drawing, in every pose."""
    poses = sum(artwork.POSES.values())
    g = torch.Generator().manual_seed(0)

    def squares(count: int, each: int) -> torch.Tensor:
        rgba = torch.zeros(count, 4, SIZE, SIZE, dtype=torch.uint8)
        rgba[:, :3, 16:48, 16:48] = torch.randint(256, (count, 3, 1, 1), generator=g, dtype=torch.uint8)
        rgba[:, 3, 16:48, 16:48] = 255
        return rgba.repeat_interleave(each, 0)

    def drawings(count: int, each: int = 1) -> Drawings:
        index = torch.arange(count * each) // each
        pose = torch.tensor([32.0, 0, 0, 0]).expand(count * each, 4)
        return Drawings(squares(count, each), index // len(STYLES), index % len(STYLES), pose)

    named = drawings(len(CONCEPTS) * len(STYLES), poses)
    clutter = torch.full((4, 4, SIZE, SIZE), 255, dtype=torch.uint8)
    return Artwork(named, drawings(24), drawings(6), clutter)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_stage_ends_as_an_uninterrupted_one(tmp_path, stop):
    def run(folder, interrupt_at=None):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))

        def loss(g):
            x = torch.randn(8, 3, generator=g)
            if interrupt_at is not None and g.initial_seed() == interrupt_at:
                raise Interrupt
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        fit("stage", module, loss, folder, steps=10, lr=0.1, muon=0.02, ema_decay=0.9, save_every=0.0, keep=(0.5,))
        return module[0].weight

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a")
    with pytest.raises(Interrupt):
        run(tmp_path / "b", interrupt_at=stop)
    assert torch.equal(run(tmp_path / "b"), whole)
    early = [torch.load(tmp_path / name / "stage-50.pt") for name in ("a", "b")]
    assert all(torch.equal(a, b) for a, b in zip(early[0].values(), early[1].values(), strict=True))


def test_without_npm_the_artwork_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="npm is not installed"):
        artwork.fetch("noto", tmp_path)


def test_muon_steps_are_orthogonal_and_leave_the_edges_to_adamw():
    x = orthogonalised(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.6 and values.max() < 1.3
    _, muon = optimizers(new_autoencoder(), 1e-3, 0.02)
    assert all(p.ndim > 1 for p in muon.param_groups[0]["params"])
    assert len(optimizers(nn.Linear(2, 2), 1e-3, 0.0)) == 1


def test_a_share_of_pictures_is_whole_and_some_have_two_faults():
    found = faults.draw_faults(20_000, torch.Generator().manual_seed(0))
    share = torch.bincount(found.sum(1)) / len(found)
    assert share.tolist() == pytest.approx([0.4, 0.6 * 0.65, 0.6 * 0.35], abs=0.02)
    assert found.float().mean(0).tolist() == pytest.approx([0.6 * 1.35 / 7] * 7, abs=0.01)


def test_renderings_for_reports_are_none_of_those_for_training():
    g = torch.Generator().manual_seed(0)
    drawing = torch.zeros(20_000, dtype=torch.long)
    rows = {
        part: set(faults.rendering(drawing, faults.draw_faults(20_000, g), g, part).tolist())
        for part in ("train", "held out", "all")
    }
    assert not rows["train"] & rows["held out"]
    never = artwork.POSES[True, True, True]  # no picture has three faults
    assert rows["train"] | rows["held out"] == rows["all"] == set(range(sum(artwork.POSES.values()) - never))


def test_a_picture_without_faults_is_the_drawing_on_its_ground(art):
    none = torch.zeros(4, len(faults.FAULTS), dtype=torch.bool)
    ground = torch.rand(4, 3)
    images = faults.compose(art.named.rgba[:4], ground, none, art.clutter, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, artwork.over(art.named.rgba[:4], ground[:, :, None, None]) * 2 - 1)


@pytest.mark.parametrize("fault", range(3, 7))
def test_a_fault_changes_the_picture_that_has_it_and_no_other(art, fault):
    marked = torch.zeros(2, len(faults.FAULTS), dtype=torch.bool)
    marked[1, fault] = True
    ground = torch.full((2, 3), 0.3)
    rgba = art.named.rgba[[0, 0]]
    images = faults.compose(rgba, ground, marked, art.clutter, torch.Generator().manual_seed(0))
    plain = artwork.over(rgba, ground[:, :, None, None]) * 2 - 1
    torch.testing.assert_close(images[0], plain[0])
    assert (images[1] - plain[1]).abs().mean() > 0.005


def test_scrambling_keeps_the_pixels_and_moves_them():
    images = torch.rand(4, 3, SIZE, SIZE)
    mixed = image_models.scrambled(images, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.flatten(2).sort(2).values, images.flatten(2).sort(2).values)
    assert not torch.equal(mixed, images)


def test_no_warp_is_the_identity():
    rgba = torch.rand(3, 4, SIZE, SIZE)
    same = image_models.warp(rgba, torch.Generator(), turn=0.0, zoom=(1.0, 1.0), move=0.0)
    torch.testing.assert_close(same, rgba, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["scorer", "judge"])
def test_a_quarter_of_a_classifiers_batch_shows_nothing_that_is_named(kind, art):
    images, labels = image_models.labelled(kind, art)(64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, SIZE, SIZE) and images.abs().max() <= 1
    assert (labels == len(CONCEPTS) * len(STYLES)).sum() == 16


def test_captions_lie_in_the_order_of_the_drawings():
    names = every_caption()
    for place, (concept, style) in enumerate(itertools.product(CONCEPTS, STYLES)):
        assert f" {concept} on " in names[place * 10] and style in names[place * 10]


def test_the_noise_schedule_is_stable_diffusions():
    scheduler = new_scheduler()
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)


def test_scorer_judge_and_critic_have_the_outputs_that_the_reward_reads():
    images = torch.zeros(2, 3, SIZE, SIZE)
    for kind in ("scorer", "judge"):
        model = image_models.new_classifier(kind)
        assert model(images).logits.shape == (2, len(CONCEPTS) * len(STYLES) + 1)
        assert [model.config.id2label[i] for i in range(len(image_models.labels()))] == image_models.labels()
    assert image_models.new_critic()(images).logits.shape == (2, 4)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.5])
    right = torch.tensor([True, True, False, True])
    assert calibration_error(confidence, right) == pytest.approx((0.7 + 0.5) / 4, abs=1e-6)


@pytest.mark.slow
def test_every_stage_runs_on_a_few_steps_and_makes_a_model_that_draws(art, tmp_path, monkeypatch):
    monkeypatch.setattr(quality.classifier_report, "__defaults__", (384,))
    monkeypatch.setattr(quality.critic_report, "__defaults__", (384,))
    monkeypatch.setattr(quality.calibrate, "__defaults__", (384,))
    for kind in ("scorer", "judge", "critic"):
        stages.image_model(kind, art, tmp_path, tmp_path / "out" / kind, steps=2, batch=16)
    assert stages.autoencoder(art, tmp_path, tmp_path / "out/scorer", steps=2, batch=4) > 0
    stages.denoiser(art, tmp_path, tmp_path / "out/model", steps=10, batch=4, pool=8)
    found = stages.verdicts(tmp_path / "out", steps=2, guidance=2.0, device=torch.device("cpu"), limit=2)
    assert set(found) == {"test", "unseen"} and (tmp_path / "out/samples.png").exists()
    assert (tmp_path / "model-20" / "model_index.json").exists()


def test_a_stage_says_which_one_comes_before_it(art, tmp_path):
    with pytest.raises(UserError, match="run the stage scorer first"):
        stages.autoencoder(art, tmp_path, tmp_path / "scorer", steps=1, batch=2)
    with pytest.raises(UserError, match="run the stage autoencoder first"):
        stages.denoiser(art, tmp_path, tmp_path, steps=1, batch=2, pool=2)
