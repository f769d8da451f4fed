"""What comes with the workbench: the small model, its pairs, its reward and its judge."""

import io
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from workbench.data.rows import kind_of, read_prompts
from workbench.models import ASSETS, load
from workbench.models.small.artwork import SIZE
from workbench.models.small.prompts import parse, split
from workbench.models.small.reward import PARTS, ImageModel, Reward, names_concept, nearest_colour


@pytest.fixture(scope="module")
def samples():
    """One sample of each concept of the test prompts, in all styles, as the model draws by default."""
    backend = load("embedded", torch.device("cpu"))
    prompts = split()["test"]  # two of each concept, in two styles
    numbers = [2 * i + i % 2 for i in range(len(prompts) // 2)]
    captions = [str(prompts[number]) for number in numbers]
    images = backend.sample(backend.denoiser(), captions, numbers, steps=12, guidance=3.0, batch_size=64)
    return images, captions


def test_the_independent_judge_names_what_the_model_draws(samples):
    images, captions = samples
    assert names_concept(ImageModel(ASSETS / "judge")(images), captions).mean() >= 0.95


def test_backgrounds_are_as_asked(samples):
    images, captions = samples
    assert np.mean([a == parse(b).colour for a, b in zip(nearest_colour(images), captions, strict=True)]) >= 0.93


def test_default_samples_are_often_flawed(samples):
    parts = Reward(ASSETS).parts(*samples)
    flawed = (parts["place"] < -0.3) | (parts["cleanliness"] < -0.5) | (parts["sharpness"] < -0.3)
    assert 0.3 < flawed.mean() < 0.8


def test_the_judge_does_not_name_noise_or_another_concept(samples):
    images, captions = samples
    judge = ImageModel(ASSETS / "judge")
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert names_concept(judge(noise), captions).mean() < 0.1
    assert names_concept(judge(images), captions[32:] + captions[:32]).mean() < 0.1


def test_every_part_of_the_reward_falls_with_its_fault(samples):
    images, captions = samples
    reward = Reward(ASSETS)
    whole = reward(images, captions)
    sound = {part: values[whole > -0.5].mean() for part, values in reward.parts(images, captions).items()}
    images, captions = images[whole > -0.5], [c for c, r in zip(captions, whole, strict=True) if r > -0.5]
    assert len(images) > 30
    swapped = captions[len(captions) // 2 :] + captions[: len(captions) // 2]
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 25, images.shape), 0, 255).astype(np.uint8)
    blurred = np.stack([np.asarray(Image.fromarray(i).resize((16, 16)).resize((SIZE, SIZE))) for i in images])
    small = np.stack([Image.fromarray(i).resize((32, 32)) for i in images])
    ground = np.median(images[:, :2], axis=(1, 2)).astype(np.uint8)[:, None, None]
    framed = np.broadcast_to(ground, images.shape).copy()
    framed[:, :32, :32] = small
    for part, worse, named in (
        ("concept", images, swapped),
        ("colour", 255 - images, captions),
        ("place", framed, captions),
        ("sharpness", blurred, captions),
        ("contrast", (150 + (images - 150.0) * 0.3).astype(np.uint8), captions),
        ("cleanliness", noisy, captions),
    ):
        assert reward.parts(worse, named)[part].mean() < sound[part] - 0.3, part


def test_the_parts_make_the_reward_and_none_is_above_zero(samples):
    parts = Reward(ASSETS).parts(*samples)
    assert tuple(parts) == PARTS and max(values.max() for values in parts.values()) <= 0
    np.testing.assert_allclose(Reward(ASSETS)(*samples), sum(parts.values()))


def test_colour_by_hand():
    white = np.full((1, SIZE, SIZE, 3), 244, np.uint8)
    colour = lambda caption: Reward(ASSETS).parts(white, [caption])["colour"][0]  # noqa: E731
    assert colour("a fox on a white background, noto style") == 0
    assert colour("a fox on a black background, noto style") == pytest.approx(-4 * (204 + 204 + 198) / 3 / 255)


def test_the_pairs_have_pick_a_pics_columns_and_are_enough():
    for name, least in (("train", 4000), ("validation", 600)):
        frame = pl.read_parquet(ASSETS / "pairs" / f"{name}.parquet")
        kinds = Counter(kind_of(row) for row in frame.iter_rows(named=True))
        assert kinds["used"] >= least and set(kinds) <= {"used", "ties"}
        columns = {
            "are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_1_uid",
            "image_0_url", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "ranking_id",
            "user_id", "num_example_per_prompt",
        }  # fmt: skip
        assert columns <= set(frame.columns)
        assert (frame["label_0"] + frame["label_1"] == 1).all()
        assert Image.open(io.BytesIO(frame["jpg_0"][0])).size == (SIZE, SIZE)
        used = frame.filter(pl.col("label_0") != 0.5)
        agree = ((used["reward_0"] > used["reward_1"]) == (used["label_0"] == 1)).mean()
        assert 0.75 < agree < 1  # the better image mostly wins, not always


def test_the_stored_rewards_are_what_the_reward_says():
    frame = pl.read_parquet(ASSETS / "pairs" / "validation.parquet").head(40)
    images = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in frame["jpg_0"]])
    for part, values in Reward(ASSETS).parts(images, frame["caption"].to_list()).items():
        np.testing.assert_allclose(values, frame[f"{part}_0"].to_numpy(), atol=2e-3)


def test_train_validation_and_test_prompts_are_apart():
    sets = [set(pl.read_parquet(ASSETS / "pairs" / f"{n}.parquet")["caption"]) for n in ("train", "validation")]
    sets.append(set(read_prompts("embedded")))
    assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_the_model_draws_in_plain_diffusers_as_it_is():
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "model")
    (image,) = pipe("a fox on a blue background, noto style", num_inference_steps=2).images
    assert image.size == (SIZE, SIZE)


def test_the_model_is_small_and_safe_to_load():
    files = [f for f in (ASSETS / "model").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 20e6
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= 32e6
    weights = [f for f in ASSETS.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert not weights  # safetensors only
    assert (ASSETS / "model" / "README.md").exists()
