"""Checkpoints that are broken, whose parts do not fit, or that somebody made to do harm."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.bad_inputs import Bad, Place

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
CANARY = "canary"  # a file that only code from a checkpoint would write


class Harm:
    """What writes the canary where it is unpickled."""

    def __init__(self, folder: Path):
        self.path = folder / CANARY

    def __reduce__(self):
        return open, (str(self.path), "w")


# --- what is done to a checkpoint ------------------------------------------------------------------------------------


def _train(place: Place) -> list[str]:
    return ["train", "--output", "out", *place.given(model_path="model")]


def _model(*changes: Callable[[Path], Any]) -> Callable[[Place], list[str]]:
    """A checkpoint after some changes."""

    def make(place: Place) -> list[str]:
        for change in changes:
            change(place.model)
        return _train(place)

    return make


def edited(file: str, **changed: Any) -> Callable[[Path], Any]:
    """Other values in a JSON file."""

    def change(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def written(file: str, content: bytes | str) -> Callable[[Path], Any]:
    """Another content of a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model / file).write_bytes(data)


def cut(file: str, end: int) -> Callable[[Path], Any]:
    """The beginning of a file."""
    return lambda model: (model / file).write_bytes((model / file).read_bytes()[:end])


def gone(name: str) -> Callable[[Path], Any]:
    """A file or folder less."""
    return lambda model: shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()


def _folder(name: str) -> Callable[[Path], Any]:
    """An empty folder."""
    return lambda model: (model / name).mkdir()


def reweighed(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Other tensors in a file of weights."""

    def rewrite(model: Path) -> None:
        tensors = load_file(model / file)
        change(tensors)
        save_file(tensors, model / file, metadata={"format": "pt"})

    return rewrite


def _first(tensors: dict[str, torch.Tensor], suffix: str = ".weight") -> str:
    return next(name for name in sorted(tensors) if name.endswith(suffix))


def _with(value: float, at: str = ".weight") -> Callable[[dict[str, torch.Tensor]], Any]:
    """One number of one tensor becomes another."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_first(tensors, at)].view(-1)[0] = value

    return change


def _eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: x.to(torch.int8) for name, x in tensors.items()}


def _turned(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, x in tensors.items() if x.ndim == 2 and x.shape[0] != x.shape[1])
    tensors[name] = tensors[name].T.contiguous()


def _fewer(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[_first(tensors)]


def head_of(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}"


def _tensor(**about: Any) -> bytes:
    """A file of weights whose head says this of its one tensor."""
    head = json.dumps({"conv_in.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | about}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(16)


def pickled(file: str, keep: bool = False) -> Callable[[Path], Any]:
    """Weights in a pickle that does harm, alone or beside the right ones."""

    def change(model: Path) -> None:
        if not keep:
            for path in (model / file).parent.glob("*.safetensors"):
                path.unlink()
        torch.save({"weight": torch.zeros(1), "harm": Harm(model.parent)}, model / file)

    return change


def disguised(file: str) -> Callable[[Path], Any]:
    """A pickle under the name of safetensors."""
    return lambda model: (model / file).write_bytes(pickle.dumps(Harm(model.parent)))


def _listed(weights: str) -> Callable[[Path], Any]:
    """Weights in several files, one of which has this name."""

    def change(model: Path) -> None:
        names = {name: weights for name in load_file(model / UNET)}
        pickled("unet/harm.bin", keep=True)(model)
        shutil.copy(model / UNET, model.parent / "outside.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _code(model: Path) -> None:
    """A class of the checkpoint's own, with its code beside it."""
    harm = f"open({str(model.parent / CANARY)!r}, 'w')\nclass Encoder:\n    from_pretrained = open\n"
    for place in (model / "text_encoder", model, model.parent):
        (place / "evil.py").write_text(harm)
    edited("model_index.json", text_encoder=["evil", "Encoder"])(model)


def _outside(model: Path) -> None:
    """A part whose name leads out of the folder, into which it would be copied."""
    (model.parent.parent / "elsewhere").mkdir()
    (model.parent.parent / "elsewhere" / "config.json").write_text("{}")
    edited("model_index.json", **{"../../elsewhere": ["diffusers", "AutoencoderKL"]})(model)


def _link(name: str, target: str) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        gone(name)(model)
        (model / name).symlink_to(target)

    return change


def _piped(file: str) -> Callable[[Path], Any]:
    """A named pipe in a file's place, which whoever opens it waits for."""

    def change(model: Path) -> None:
        gone(file)(model)
        os.mkfifo(model / file)

    return change


INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
HUGE = 10**9
MODELS: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "a pipe for weights": (_model(_piped(UNET)), "unet: diffusion_pytorch_model.safetensors is a named pipe"),
    "a pipe for a config": (_model(_piped("vae/config.json")), "vae: config.json is a named pipe, not a file"),
    "a pipe for a vocabulary": (
        _model(_piped("tokenizer/tokenizer.json")),
        "tokenizer: tokenizer.json is a named pipe, not a file",
    ),
    "no index": (_model(gone(INDEX)), "no model_index.json in model"),
    "an index that is no JSON": (_model(cut(INDEX, 30)), "model_index.json cannot be read"),
    "an index in UTF-16": (_model(written(INDEX, "{}".encode("utf-16"))), "model_index.json cannot be read"),
    "an index that is a list": (_model(written(INDEX, "[1]")), "model_index.json holds [1]"),
    "an index of lists in lists": (_model(written(INDEX, "[" * 100_000)), "model_index.json cannot be read"),
    "an index of 2 MB": (_model(written(INDEX, " " * 2**21 + "{}")), "model_index.json is too long"),
    "an index without a class": (_model(written(INDEX, "{}")), "a checkpoint for None"),
    "a pipeline that is none": (_model(edited(INDEX, _class_name="os.system")), "a checkpoint for os.system"),
    "a list of pipelines": (_model(edited(INDEX, _class_name=["evil", "Pipe"])), "a checkpoint for ['evil', 'Pipe']"),
    "a number for a part": (_model(edited(INDEX, vae=3)), "vae is a None.None"),
    "numbers for a part's class": (_model(edited(INDEX, vae=[1, 2])), "'vae' = [1, 2] in model_index.json"),
    "an empty list for a part": (_model(edited(INDEX, vae=[])), "'vae' = [] in model_index.json"),
    "a part that is os.system": (_model(edited(INDEX, vae=["os", "system"])), "vae is a os.system"),
    "a part that is another": (_model(edited(INDEX, vae=["transformers", "CLIPTextModel"])), "vae cannot be loaded"),
    "a part with code beside it": (_model(_code), "text_encoder is a evil.Encoder"),
    "a part above the folder": (_model(_outside), "'../../elsewhere' = "),
    "a part at the root": (_model(edited(INDEX, **{"/etc": ["diffusers", "AutoencoderKL"]})), "'/etc' = "),
    "no autoencoder": (_model(gone("vae")), "no vae in model"),
    "no weights": (_model(gone(UNET)), "unet: no weights in safetensors"),
    "a file for a folder": (_model(gone("unet"), written("unet", "x")), "no unet in model"),
    "a link to itself": (_model(_link("unet", "unet")), "no unet in model"),
    "weights that are a link to nothing": (_model(_link(UNET, "../../../nothing")), "unet"),
    "a config that is no JSON": (_model(cut("unet/config.json", 50)), "unet: config.json cannot be read"),
    "a config that is a number": (_model(written("unet/config.json", "3")), "unet: config.json holds 3"),
    "an encoder's config that is no JSON": (_model(cut("text_encoder/config.json", 50)), "text_encoder: config.json"),
    "no config": (_model(gone("vae/config.json")), "vae: config.json cannot be read"),
    "layers without end": (_model(edited("unet/config.json", layers_per_block=HUGE)), "layers_per_block = 1000000000"),
    "an encoder's layers without end": (
        _model(edited("text_encoder/config.json", num_hidden_layers=HUGE)),
        "text_encoder: num_hidden_layers = 1000000000",
    ),
    "channels without end": (
        _model(edited("unet/config.json", block_out_channels=[HUGE, HUGE])),
        "unet: block_out_channels = 1000000000",
    ),
    "blocks without end": (
        _model(edited("unet/config.json", down_block_types=["DownBlock2D"] * 10_000)),
        "unet: down_block_types in its config has 10000 entries",
    ),
    "words without end": (_model(edited("text_encoder/config.json", vocab_size=10**12)), "vocab_size = 1000000000000"),
    "places without end": (
        _model(edited("text_encoder/config.json", max_position_embeddings=10**12)),
        "max_position_embeddings = 1000000000000",
    ),
    "more than memory": (_model(edited("unet/config.json", cross_attention_dim=60_000)), "unet"),
    "fewer than no channels": (_model(edited("unet/config.json", block_out_channels=[-8, -16])), "unet"),
    "words for channels": (_model(edited("vae/config.json", block_out_channels="many")), "block_out_channels = 'many'"),
    "blocks that are none": (_model(edited("unet/config.json", down_block_types=["os.system"] * 2)), "unet"),
    "images of no size": (_model(edited("unet/config.json", sample_size=0)), "unet has sample_size = 0"),
    "images of any size": (_model(edited("unet/config.json", sample_size=None)), "unet has sample_size = None"),
    "images of a word": (_model(edited("unet/config.json", sample_size="big")), "unet has sample_size = 'big'"),
    "images of 60,000": (_model(edited("unet/config.json", sample_size=60_000)), "unet has sample_size = 60000"),
    "a model for inpainting": (_model(edited("unet/config.json", in_channels=9)), "unet has in_channels = 9"),
    "latents that are no number": (
        _model(edited("vae/config.json", scaling_factor=float("nan"))),
        "vae has scaling_factor = nan",
    ),
    "latents of nothing": (_model(edited("vae/config.json", scaling_factor=0)), "vae has scaling_factor = 0"),
    "grey images": (_model(edited("vae/config.json", in_channels=1)), "vae has in_channels = 1"),
    "no timesteps": (_model(edited(SCHEDULER, num_train_timesteps=0)), "scheduler has num_train_timesteps = 0"),
    "timesteps without end": (_model(edited(SCHEDULER, num_train_timesteps=10**12)), "num_train_timesteps = 100000000"),
    "a word for the timesteps": (_model(edited(SCHEDULER, num_train_timesteps="all")), "num_train_timesteps = 'all'"),
    "noise below nothing": (_model(edited(SCHEDULER, beta_start=-0.5)), "scheduler"),
    "noise beyond everything": (_model(edited(SCHEDULER, beta_end=7.0)), "scheduler describes no noise"),
    "noise that falls": (_model(edited(SCHEDULER, trained_betas=[1.5] * 1000)), "scheduler describes no noise"),
    "noise that is no number": (_model(edited(SCHEDULER, beta_end=float("nan"))), "scheduler describes no noise"),
    "a schedule that is none": (_model(edited(SCHEDULER, beta_schedule="os.system")), "scheduler cannot be loaded"),
    "a target that is none": (_model(edited(SCHEDULER, prediction_type=[1])), "the model predicts [1]"),
    "steps that are none": (_model(edited(SCHEDULER, timestep_spacing="wide")), "scheduler cannot be loaded"),
    "a scheduler that is no JSON": (_model(cut(SCHEDULER, 40)), "scheduler: scheduler_config.json cannot be read"),
    "half the weights": (_model(cut(UNET, 20_000)), "unet: diffusion_pytorch_model.safetensors cannot be loaded"),
    "no bytes of weights": (_model(written(UNET, b"")), "unet: diffusion_pytorch_model.safetensors cannot be loaded"),
    "a head of 4 exbibytes": (_model(written(UNET, head_of(2**62))), "diffusion_pytorch_model.safetensors cannot be"),
    "a head longer than the file": (
        _model(written(UNET, head_of(10_000))),
        "diffusion_pytorch_model.safetensors cannot",
    ),
    "a tensor beyond the file": (
        _model(written(UNET, _tensor(data_offsets=[0, 2**40]))),
        "safetensors cannot be loaded",
    ),
    "a tensor of 10^18 numbers": (
        _model(written(UNET, _tensor(shape=[10**9, 10**9]))),
        "safetensors cannot be loaded",
    ),
    "a tensor of less than nothing": (_model(written(UNET, _tensor(shape=[-4]))), "safetensors cannot be loaded"),
    "a type that is none": (_model(written(UNET, _tensor(dtype="os.system"))), "safetensors cannot be loaded"),
    "8-bit weights": (_model(reweighed(UNET, _eight_bits)), "is stored as I8"),
    "8-bit weights of an encoder": (_model(reweighed(TEXT, _eight_bits)), "text_encoder: "),
    "a weight too few": (_model(reweighed(UNET, _fewer)), "is not there (1 in all)"),
    "a weight of an encoder too few": (_model(reweighed(TEXT, _fewer)), "text_encoder"),
    "a weight turned": (_model(reweighed(UNET, _turned)), "unet"),
    "a weight of an encoder turned": (_model(reweighed(TEXT, _turned)), "text_encoder"),
    "a weight that is no number": (_model(reweighed(UNET, _with(float("nan")))), "unet: "),
    "a bias that is no number": (_model(reweighed(UNET, _with(float("nan"), ".bias"))), "unet: "),
    "an infinite weight": (_model(reweighed(UNET, _with(float("inf")))), "has values that are not finite"),
    "an autoencoder's weight that is no number": (_model(reweighed(VAE, _with(float("nan")))), "vae: "),
    "an encoder's weight that is no number": (_model(reweighed(TEXT, _with(float("nan")))), "text_encoder: "),
    "a pickle": (_model(pickled("unet/diffusion_pytorch_model.bin")), "unet has only pickled weights"),
    "an encoder's pickle": (
        _model(pickled("text_encoder/pytorch_model.bin")),
        "text_encoder has only pickled weights",
    ),
    "a checkpoint's pickle": (_model(pickled("vae/model.ckpt")), "vae has only pickled weights"),
    "a pickle called safetensors": (_model(disguised(UNET)), "diffusion_pytorch_model.safetensors cannot be loaded"),
    "an encoder's pickle called safetensors": (_model(disguised(TEXT)), "model.safetensors cannot be loaded"),
    "an index of a pickle": (_model(_listed("harm.bin")), "names 'harm.bin', not a safetensors file beside it"),
    "an index of weights above": (_model(_listed("../../outside.safetensors")), "names '../../outside.safetensors'"),
    "a tokenizer of nothing": (_model(gone("tokenizer"), _folder("tokenizer")), "its tokenizer makes 10000"),
    "a tokenizer that is no JSON": (_model(cut("tokenizer/tokenizer.json", 500)), "tokenizer cannot be loaded"),
    "a tokenizer that is a list": (_model(written("tokenizer/tokenizer.json", "[]")), "tokenizer cannot be loaded"),
    "texts without end": (
        _model(edited("tokenizer/tokenizer_config.json", model_max_length=10**12)),
        "text_encoder takes 16 tokens, its tokenizer makes 1000000000000",
    ),
}


def cases() -> list[Bad]:
    """All of them."""
    return [Bad(f"checkpoint: {name}", make, ("model.path = 'model'", says)) for name, (make, says) in MODELS.items()]
