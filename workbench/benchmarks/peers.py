"""A training step of the public Diffusion-DPO scripts against ours, from checkouts that the user has.

Both are whole commands in processes of their own, as their users call them, each with few and with more steps: the
difference is seconds a step, without imports, loading and saving. Nothing of the scripts is here but their options.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from workbench.benchmarks.encoding import pairs_file
from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.sandbox import databases, of_checkout, temporary_folder
from workbench.common.errors import Failure, UserError, one_line
from workbench.models import SHAPES, fetch

FEW, MORE = 4, 24  # steps of a call; what the calls differ by is timed
PAIRS, DATA = 4, 128  # of a step, and in all
SHAPE = "sd34m"  # whose blocks the denoiser has; at the size of the small model's latents


@dataclass(frozen=True)
class Peer:
    """A public training script.

    Attributes:
        source: where a checkout comes from.
        script: in the checkout.
        rank: of the adapters that it is given and ours trains; 0 = full fine-tune.
        split: its option for the split of the data.
        options: others, so that both do the same.
        cuda: whether it runs on CUDA GPUs alone.
    """

    source: str
    script: str
    rank: int
    split: str
    options: tuple[str, ...]
    cuda: bool = False


#: What both scripts take. No mixed precision, and what ours does by default or is told to do as well.
COMMON = ("--no_hflip", "--mixed_precision", "no", "--lr_scheduler", "constant", "--seed", "0")
PEERS = {
    "diffusers": Peer(
        "https://github.com/huggingface/diffusers",
        "examples/research_projects/diffusion_dpo/train_diffusion_dpo.py",
        8,
        "--dataset_split_name",
        ("--rank", "8"),
    ),
    "salesforce": Peer(
        "https://github.com/SalesforceAIResearch/DiffusionDPO",
        "train.py",
        0,
        "--split",
        ("--proportion_empty_prompts", "0"),
        cuda=True,  # it asks for the attention of xformers, which diffusers refuses elsewhere
    ),
}
#: How ours comes by a batch: encoded once, before training, or like the scripts at every step.
WAYS = {"encoded once": "true", "images encoded at every step": "false"}


def checkouts(told: Sequence[str]) -> dict[str, Path]:
    """Scripts by peer from texts NAME=FOLDER.

    Raises:
        UserError: an unknown name, a folder without the script, or a script that does not run on this machine.
    """
    found = {}
    for text in told:
        name, _, folder = text.partition("=")
        if name not in PEERS or not folder:
            raise UserError(f"--peer {text}: give NAME=FOLDER, where NAME is one of {', '.join(PEERS)}")
        script = Path(folder).expanduser().resolve() / PEERS[name].script
        if not script.is_file():
            raise UserError(
                f"--peer {text}: has no {PEERS[name].script}; a checkout of {PEERS[name].source} is expected"
            )
        if PEERS[name].cuda and not torch.cuda.is_available():
            raise UserError(f"--peer {text}: its script runs on CUDA GPUs alone (xformers), and there is none here")
        found[name] = script
    return found


def peers(options: Options) -> Iterator[Figure]:
    """Seconds a step of each script over ours: the same untrained model, pairs, precision and threads, in turn.

    The scripts decode and encode a batch's images at every step. So there are two ratios: against ours as it is used,
    which encodes all pairs once, before, and against ours made to do the same as they.

    Raises:
        Failure: some scripts failed; the figures of the others have been given.
    """
    repeats = max(3, options.repeats // 5)
    with temporary_folder(options.folder) as folder:
        model, data = untrained(folder / "model"), folder / "data"
        data.mkdir()
        pairs_file(data / "train.parquet", DATA)
        failures: list[Failure] = []
        for name, script in options.peers.items():
            ways = [ours(PEERS[name], model, data, cached) for cached in WAYS.values()]
            calls = [theirs(PEERS[name], script, model, data), *ways]
            try:
                yield from _compared(name, calls, folder, repeats)
            except Failure as error:
                failures.append(error)
        if failures:
            raise Failure("; ".join(str(error) for error in failures))


def _compared(name: str, calls: Sequence[Sequence[str]], folder: Path, repeats: int) -> Iterator[Figure]:
    """A script's figures.

    Args:
        calls: its own, then ours in each of WAYS.
        repeats: rounds of all calls in turn.
    """
    peer = PEERS[name]
    # Not timed: the first call of each fills caches that later ones share (its encoded pairs, prepared data, files of
    # the system), and it is the call with few steps, which would be subtracted.
    for call in tqdm(calls, desc=f"{name}: filling caches", leave=False, disable=None):
        _seconds(call, FEW, folder, name)
    rounds = tqdm(range(repeats), desc=name, leave=False, disable=None)
    took = [[seconds_a_step(call, folder, name) for call in calls] for _ in rounds]
    note = f"{f'LoRA, rank {peer.rank}' if peer.rank else 'full'}, {SHAPE}, {PAIRS} pairs, float32"
    for place, way in enumerate(WAYS, 1):
        ratios = [one[0] / one[place] for one in took]
        yield figure("peers", f"{name}'s step / ours: {way}", ratios, 1.0, at_least=True, note=note)
    yield figure("peers", f"{name}: a step", [one[0] for one in took], None, unit="s", note=note)


def untrained(folder: Path) -> Path:
    """Write the small model with an untrained denoiser, as a diffusers folder."""
    from diffusers import UNet2DConditionModel

    small = fetch("embedded")
    small.copy_parts(folder, without="unet")
    fitting = {
        name: small.config("unet")[name]
        for name in ("in_channels", "out_channels", "sample_size", "cross_attention_dim")
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        denoiser: Any = UNet2DConditionModel.from_config({**SHAPES[SHAPE].denoiser, **fitting})
    denoiser.save_pretrained(folder / "unet")
    return folder


def theirs(peer: Peer, script: Path, model: Path, data: Path) -> list[str]:
    """The call of a public script, without its number of steps."""
    told = {
        "--pretrained_model_name_or_path": str(model),
        "--dataset_name": str(data),
        peer.split: "train",
        "--resolution": str(fetch("embedded").config("unet")["sample_size"] * _pixels()),
        "--train_batch_size": str(PAIRS),
        "--gradient_accumulation_steps": "1",
        "--checkpointing_steps": str(10**6),
        "--output_dir": "OUT",
    }
    return [
        sys.executable,
        str(script),
        *(word for pair in told.items() for word in pair),
        *COMMON,
        *peer.options,
        "--max_train_steps",
    ]


def _pixels() -> int:
    """Pixels of the small model to a latent along each edge."""
    return 2 ** (len(fetch("embedded").config("vae")["block_out_channels"]) - 1)


def ours(peer: Peer, model: Path, data: Path, cache: str) -> list[str]:
    """The call of our command, without its number of steps.

    Args:
        cache: `data.cache`: "true" encodes before training, "false" at every step.
    """
    settings: dict[str, Any] = {
        "model.path": model, "data.train": data, "data.validation": data, "data.validation_limit": 8,
        "data.cache": cache, "data.caption_dropout": 0, "data.flip": "false", "train.batch_size": PAIRS,
        "train.accumulation": 1, "lora.rank": peer.rank, "reference.policy": "frozen", "diagnostics.probe": 8,
        "diagnostics.pairs": 8, "diagnostics.draws": 1, "diagnostics.interval": 10**6, "evaluation.seeds": 0,
        "evaluation.grid": 0, "snapshots.interval": 0,
    }  # fmt: skip
    told = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "workbench.train", "--no-tracking", "--output", "OUT", *told, "--set", "train.steps="]


def seconds_a_step(call: Sequence[str], folder: Path, name: str) -> float:
    """What a step takes: a call with many steps against one with few, each into a new folder.

    Args:
        call: a command whose last word is its option for the number of steps, or ends in "=" and takes it itself.
        name: of the peer, for messages.
    Raises:
        Failure: a call failed, or more steps took no longer.
    """
    few, more = (_seconds(call, steps, folder, name) for steps in (FEW, MORE))
    if more <= few:
        raise Failure(
            f"peers: {MORE} steps took {more:.1f} s, {FEW} took {few:.1f} s; leave the machine alone and repeat"
        )
    return (more - few) / (MORE - FEW)


def _seconds(call: Sequence[str], steps: int, folder: Path, name: str) -> float:
    with temporary_folder(folder) as place:
        last = [f"{call[-1]}{steps}"] if call[-1].endswith("=") else [call[-1], str(steps)]
        words = [str(place / "out") if word == "OUT" else word for word in call[:-1]]
        begin = time.perf_counter()
        done = subprocess.run(
            [*words, *last], cwd=place, env=_environment(folder), capture_output=True, text=True, errors="replace"
        )
        took = time.perf_counter() - begin
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise Failure(f"peers: {name}: {one_line(RuntimeError(said[-1]))} ({' '.join(words[1:3])})")
    return took


def _environment(folder: Path) -> Mapping[str, str]:
    """Of both: as many threads, nothing from or to the network, caches in a folder of their own."""
    own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    own |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "WORKBENCH_CACHE": str(folder / "cache")}
    return os.environ | databases(folder) | own | of_checkout()
