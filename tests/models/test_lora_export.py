"""LoRA weights in other programs' layouts: the same model, whoever reads them."""

import diffusers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from workbench.common.errors import UserError
from workbench.export_lora import main
from workbench.models import adapt, load
from workbench.models.lora_export import METADATA, export, read

CPU = torch.device("cpu")


def trained(model, folder, alpha):
    """A folder with a tiny checkpoint, and adapters of rank 4 for it that change what it draws."""
    (folder / "model").symlink_to(model)
    backend = load(str(folder / "model"), CPU)
    denoiser = backend.denoiser()
    policy, *_ = adapt(denoiser, rank=4, alpha=alpha, targets=backend.LORA_TARGETS)
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data.normal_(std=0.3)
    backend.save(policy, folder / "lora")
    return backend


def changed_by(folder, part, path):
    """The weights of a checkpoint's denoiser with LoRA weights that diffusers loads and fuses into it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(components=[part])
    pipe.unload_lora_weights()
    return {name.replace(".base_layer", ""): x for name, x in getattr(pipe, part).state_dict().items()}


def scale_ignored(source, target):
    """A file as a program reads it that knows nothing of diffusers' metadata, and no alpha but tensors."""
    save_file(load_file(source), target, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("family", "layout", "alpha"),
    [("sd", "kohya", 1.0), ("sdxl", "kohya", 6.0), ("sd", "diffusers", 6.0), ("sd3", "diffusers", 1.0)],
)
def test_everybody_reads_the_same_update(family, layout, alpha, checkpoint, tmp_path):
    backend = trained(checkpoint(family), tmp_path, alpha)
    export(tmp_path / "lora", tmp_path / "mine.safetensors", layout)
    original = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    wanted = changed_by(tmp_path, backend.DENOISER, original)
    for path in (
        tmp_path / "mine.safetensors",
        scale_ignored(tmp_path / "mine.safetensors", tmp_path / "x.safetensors"),
    ):
        found = changed_by(tmp_path, backend.DENOISER, path)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    other = changed_by(tmp_path, backend.DENOISER, scale_ignored(original, tmp_path / "y.safetensors"))
    assert any((other[name] - wanted[name]).abs().max() > 0.01 for name in wanted)  # what the export is for


def test_kohya_files_have_alpha_beside_every_layer(checkpoint, tmp_path):
    trained(checkpoint("sd"), tmp_path, 6.0)
    done = CliRunner().invoke(main, [str(tmp_path / "lora"), str(tmp_path / "mine.safetensors")])
    assert done.exit_code == 0 and "Written: " in done.output, done.output
    tensors = load_file(tmp_path / "mine.safetensors")
    downs = {name.removesuffix(".lora_down.weight") for name in tensors if name.endswith(".lora_down.weight")}
    assert tensors.keys() == {d + end for d in downs for end in (".lora_down.weight", ".lora_up.weight", ".alpha")}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in downs
    assert {float(tensors[f"{name}.alpha"]) for name in downs} == {6.0}


def test_what_cannot_be_exported_is_one_line(checkpoint, tmp_path):
    trained(checkpoint("sd3"), tmp_path, 4.0)
    with pytest.raises(UserError, match=r"--format kohya: has names for UNets .*, not for a transformer; take"):
        export(tmp_path / "lora", tmp_path / "mine.safetensors", "kohya")
    assert not (tmp_path / "mine.safetensors").exists()
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UserError, match=r"there\.safetensors: exists already"):
        export(tmp_path / "lora", tmp_path / "there.safetensors", "diffusers")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export(tmp_path / "lora", tmp_path / "mine.pt", "diffusers")
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={METADATA: "{}"})
    with pytest.raises(UserError, match="expected LoRA weights of one network"):
        read(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="nowhere cannot be read"):
        read(tmp_path / "nowhere")
