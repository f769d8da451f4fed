"""Models that are evaluated, and a working folder that has them."""

import shutil

import pytest
import torch

from tests.support.evaluations import PROMPTS
from tests.support.reward_models import save_clip
from workbench.evaluation import sample_store


@pytest.fixture(scope="session")
def other_model(tiny_model, tmp_path_factory):
    """The tiny model with another UNet."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    torch.manual_seed(1)
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))[0]


@pytest.fixture
def place(workplace, tiny_model, other_model, monkeypatch):
    """A working folder with prompts and both models; shards of three images."""
    monkeypatch.setattr(sample_store, "SHARD", 3)
    (workplace / "prompts.txt").write_text("\n".join(PROMPTS))
    (workplace / "tiny").symlink_to(tiny_model)
    (workplace / "other").symlink_to(other_model)
    return workplace
