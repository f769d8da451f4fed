import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.support import families
from workbench.common.distributed import pick_device
from workbench.common.errors import UserError
from workbench.models import load

CPU = torch.device("cpu")


def test_the_folder_loads_in_plain_diffusers_and_draws_the_same_image(tiny_model):
    backend = load(str(tiny_model), CPU)
    caption = "a fox on a blue background, noto style"
    ours = backend.sample(backend.denoiser(), [caption], [3], steps=2, guidance=2.0, batch_size=1)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, torch_dtype=torch.float32)
    theirs = pipeline(
        caption, num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(3), output_type="np"
    ).images
    assert np.abs(ours.astype(float) - np.round(theirs * 255)).max() <= 1


def test_images_do_not_depend_on_the_batch_they_are_drawn_in(tiny_model):
    backend = load(str(tiny_model), CPU)
    captions = [f"a {c} on a red background, noto style" for c in ("fox", "pig", "owl")]
    draw = lambda size: backend.sample(  # noqa: E731
        backend.denoiser(), captions, [1, 2, 3], steps=2, guidance=1.0, batch_size=size
    )
    assert np.abs(draw(3).astype(int) - draw(1).astype(int)).max() <= 1


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "none of its keys"])
def test_sdxl_samples_are_not_clipped_whatever_scheduler_its_config_is_of(tmp_path, scheduler):
    families.sdxl().save_pretrained(tmp_path / "fresh")
    file = tmp_path / "fresh" / "scheduler" / "scheduler_config.json"
    if scheduler == "none of its keys":
        file.write_text(json.dumps(families.SCHEDULE))
    else:  # as diffusers saves a new one of its class
        getattr(diffusers, scheduler)(**families.SCHEDULE).save_pretrained(file.parent)
    shutil.copytree(tmp_path / "fresh", tmp_path / "right")
    whole = {"steps_offset": 1, **json.loads(file.read_text()), "clip_sample": False, "set_alpha_to_one": True}
    (tmp_path / "right" / "scheduler" / file.name).write_text(json.dumps(whole))
    right, fresh = (load(str(tmp_path / name), CPU) for name in ("right", "fresh"))
    draw = [b.sample(b.denoiser(), ["a fox"], [3], steps=2, guidance=2.0, batch_size=1) for b in (right, fresh)]
    assert fresh.scheduler.config.clip_sample is False and np.array_equal(*draw)
    assert "-clip_sample=False" in fresh.digest("scheduler") and "clip" not in right.digest("scheduler")
    assert fresh.digest("vae") == right.digest("vae")


def test_missing_parts_are_named(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"model\.path = .*not a checkpoint folder"):
        load(str(tmp_path / "nowhere"), CPU)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(UserError, match="no text_encoder in"):
        load(str(copy), CPU)


def test_another_autoencoder_takes_the_place_of_the_checkpoints_own(tiny_model, tmp_path):
    torch.manual_seed(7)
    vae = families.autoencoder(4)
    vae.save_pretrained(tmp_path / "root")
    vae.save_pretrained(tmp_path / "inside" / "vae")
    own, other = load(str(tiny_model), CPU), load(str(tiny_model), CPU, vae=str(tmp_path / "root"))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(x).latent_dist.mean * own.pipeline.vae.config.scaling_factor
    assert not torch.allclose(own.encode_images(pixels), other.encode_images(pixels), atol=1e-3)
    scale = own.pipeline.vae.config.scaling_factor / other.pipeline.vae.config.scaling_factor
    assert torch.allclose(other.encode_images(pixels) * scale, mean, atol=1e-5)
    assert own.digest("vae") != other.digest("vae") and own.digest("unet") == other.digest("unet")
    again = load(str(tiny_model), CPU, vae=str(tmp_path / "inside"))
    assert again.digest("vae", "text_encoder") == other.digest("vae", "text_encoder")
    other.save(other.denoiser(), tmp_path / "saved")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(pipe.vae.state_dict()["encoder.conv_in.weight"], vae.state_dict()["encoder.conv_in.weight"])


def test_an_autoencoder_that_does_not_fit_is_one_line(tiny_model, tmp_path):
    families.autoencoder(8).save_pretrained(tmp_path / "eight")
    families.unet(cross_attention_dim=64).save_pretrained(tmp_path / "unet")
    for name, words in (
        ("nowhere", "no autoencoder in diffusers' layout"),
        ("eight", "has 8 latent channels, but .* has 4"),
        ("unet", "is a 'UNet2DConditionModel', but .* has a AutoencoderKL"),
    ):
        with pytest.raises(UserError, match=rf"^model\.vae = '{tmp_path / name}': {words}"):
            load(str(tiny_model), CPU, vae=str(tmp_path / name))


def test_another_prediction_type_is_refused(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="predicts 'sample'"):
        load(str(copy), CPU)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_one_line(tiny_model, tmp_path, part):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (weights,) = (copy / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        backend = load(str(copy), CPU)
        backend.denoiser(), backend.pipeline


def test_a_text_encoder_that_loads_and_takes_no_caption_is_one_line(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    file = copy / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    with pytest.raises(UserError, match="its text encoders do not take a caption"):
        load(str(copy), CPU).encode_text(["a fox"])


def test_an_unknown_device_is_named():
    with pytest.raises(UserError, match=r"model\.device = 'quantum'"):
        pick_device("quantum")
