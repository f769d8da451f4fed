import pytest
import torch
from torch import nn

from workbench.common.errors import UserError
from workbench.models.small import artwork
from workbench.models.small.artwork import Drawings
from workbench.models.small.prompts import CONCEPTS
from workbench.models.small.recipe import (
    LATENT_CHANNELS,
    classifier_batch,
    damaged,
    labels,
    new_classifier,
    new_critic,
    new_scheduler,
    scrambled,
    shifted,
    warp,
)
from workbench.pretrain import fit


def drawings(count=6) -> Drawings:
    rgba = torch.zeros(count, 4, 32, 32)
    rgba[:, :, 8:24, 8:24] = torch.rand(count, 4, 1, 1)
    rgba[:, 3, 8:24, 8:24] = 1
    return Drawings(rgba, torch.arange(count) % len(CONCEPTS), torch.arange(count) % 3)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_stage_ends_as_an_uninterrupted_one(tmp_path, stop):
    def run(folder, interrupt_at=None):
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def loss(g):
            x = torch.randn(8, 3, generator=g)
            if interrupt_at is not None and g.initial_seed() == interrupt_at:
                raise Interrupt
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        fit("stage", module, loss, folder, steps=10, lr=0.1, ema_decay=0.9, save_every=0.0)
        return module.weight

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a")
    with pytest.raises(Interrupt):
        run(tmp_path / "b", interrupt_at=stop)
    assert torch.equal(run(tmp_path / "b"), whole)


def test_without_npm_the_artwork_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="npm is not installed"):
        artwork.fetch("noto", tmp_path)


def test_damage_is_nothing_or_much_and_a_sound_drawing_is_left_alone():
    d = drawings()
    g = torch.Generator().manual_seed(0)
    rgba = d.rgba.repeat(60, 1, 1, 1)
    images, damage = damaged(rgba, torch.ones(len(rgba), 3), g)
    assert images.shape == (360, 3, 32, 32) and images.abs().max() <= 1
    assert damage.min() == 0 and damage.max() > 0.9  # one drawing in 64 is not touched
    clean = artwork.compose(rgba, torch.ones(len(rgba), 3))
    torch.testing.assert_close(images[damage == 0], clean[damage == 0], atol=1e-5, rtol=0)
    change = (images - clean).abs().mean((1, 2, 3))
    assert change[damage > 0.7].mean() > 3 * change[(damage < 0.3) & (damage > 0)].mean()


def test_scrambling_keeps_the_pixels_and_moves_them():
    images = torch.rand(4, 3, 32, 32)
    mixed = scrambled(images, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.flatten(2).sort(2).values, images.flatten(2).sort(2).values)
    assert not torch.equal(mixed, images)


def test_no_warp_is_the_identity():
    rgba = drawings().rgba
    same = warp(rgba, torch.Generator(), turn=0.0, zoom=(1.0, 1.0), move=0.0)
    torch.testing.assert_close(same, rgba, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["scorer", "judge"])
def test_a_third_of_a_classifiers_batch_shows_nothing_that_is_named(kind):
    images, labels = classifier_batch(kind, drawings(), drawings(), torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, 32, 32) and images.abs().max() <= 1
    assert (labels == len(CONCEPTS)).sum() == 22


def test_shifted_drawings_keep_their_labels():
    d = shifted(drawings(4))
    assert len(d.rgba) == 4 * len(artwork.SHIFTS) == len(d.concept)
    assert d.concept[4:8].tolist() == d.concept[:4].tolist()


def test_the_noise_schedule_is_stable_diffusions():
    scheduler = new_scheduler()
    assert scheduler.config.prediction_type == "epsilon" and LATENT_CHANNELS == 12
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)


def test_scorer_judge_and_critic_have_the_outputs_that_the_reward_reads():
    images = torch.zeros(2, 3, 32, 32)
    for kind in ("scorer", "judge"):
        model = new_classifier(kind)
        assert model(images).logits.shape == (2, len(CONCEPTS) + 1)
        assert [model.config.id2label[i] for i in range(len(labels()))] == labels()
    assert new_critic()(images).logits.shape == (2, 1)
