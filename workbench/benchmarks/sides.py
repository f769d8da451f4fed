"""What is done beside training: diagnostics, encoding, the start of a command, the report of a study."""

import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import numpy as np
import polars as pl
import torch
from PIL import Image

from workbench import models, tracking
from workbench.benchmarks.commands import EXPERIMENTS, folder, workplace
from workbench.benchmarks.figure import Figure, Options, control, figure
from workbench.benchmarks.measurement import random_pairs
from workbench.benchmarks.step import open_model
from workbench.benchmarks.timing import in_turn, seconds
from workbench.common.errors import UserError
from workbench.common.paths import PACKAGE, shipped
from workbench.data.encoding import encode as encode_pairs
from workbench.data.rows import open_rows, read_prompts
from workbench.models import ASSETS, Backend, Shape, fetch
from workbench.models.random_weights import VAE
from workbench.studies import lifecycle, results
from workbench.studies.space import arms_of, read_space, settings_of
from workbench.studies.storage import locked
from workbench.studies.trials import SHOWN
from workbench.studies.tuning import settle
from workbench.tracking import study_runs, tags
from workbench.training.config import Config, read, resolve
from workbench.training.diagnostics import BucketDiagnostics
from workbench.training.run import metric_names

Spent = dict[str, float]  # seconds by what they were spent in


@contextmanager
def timed(owner: Any, *names: str) -> Iterator[Spent]:
    """Count the seconds that are spent in functions of an object or a module, by name."""
    spent, before = dict.fromkeys(names, 0.0), {name: getattr(owner, name) for name in names}
    own = {name: name in vars(owner) for name in names}

    def counted(name: str) -> Callable:
        @wraps(before[name])
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return before[name](*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - begin

        return call

    for name in names:
        setattr(owner, name, counted(name))
    try:
        yield spent
    finally:
        for name in names:
            if own[name]:
                setattr(owner, name, before[name])
            else:  # a method of its class
                delattr(owner, name)


# Diagnostics


def diagnostics(
    options: Options, pairs: int = 400, backend: Backend | None = None, shape: Shape | None = None
) -> Iterator[Figure]:
    """A full pass of the bucket diagnostics against the same calls of the denoiser, on inputs made beforehand."""
    if backend is None or shape is None:
        backend, shape = open_model("embedded", options.device)
    with folder(options.place) as name, workplace(Path(name)):
        work, forwards = passes(backend, shape, pairs)
        name = f"diagnostics over 10 buckets, {pairs} pairs"
        repeats = max(4, options.repeats // 2)
        took, first, second = in_turn(
            work, forwards, forwards, repeats=repeats, device=options.device, warm=1, name=name
        )
    yield control("diagnostics", "control: the forwards against themselves", second / first)
    yield figure("diagnostics", f"{name}, against the forwards", took / first, 1.1, note="3 draws a pair, 64 images")


def passes(backend: Backend, shape: Shape, pairs: int, buckets: int = 10) -> tuple[Callable, Callable]:
    """A full pass of the diagnostics of a model over random pairs, and the denoiser's calls that it makes, alone.

    The pretrained model's side is in the cache afterwards.
    """
    calls: list[tuple] = []

    def kept(model: Any, *inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        return backend.denoise(model, *inputs)

    policy, data = backend.denoiser(), random_pairs(shape, backend, pairs)
    diagnose = BucketDiagnostics(
        kept, policy, data, backend.process.to(backend.device),
        pretrained_digest=f"bench-{time.time_ns()}", buckets=buckets, curve=100, draws=3, device=backend.device,
    )  # fmt: skip
    diagnose.denoise = backend.denoise

    @torch.no_grad()
    def forwards() -> None:
        for inputs in calls:
            backend.denoise(policy, *inputs)

    return partial(diagnose, policy, full=True), forwards


# Encoding


def encode(options: Options, pairs: int = 2000, large: int = 2) -> Iterator[Figure]:
    """The share of encoding that is spent neither in the autoencoder nor in the text encoders.

    Args:
        pairs: of the small model's images; most of those that come with the workbench.
        large: pairs of 768 pixels for an autoencoder of SD1.5's size, with random weights; 0 = none.
    """
    what = "time outside of autoencoder and text encoder"
    with folder(options.place) as name, workplace(Path(name)):
        place, backend = Path(name), models.load("embedded", options.device)
        file = pairs_file(place / "small.parquet", pairs)
        encode_once(backend, file)  # models are loaded and warm
        shares = encoding_shares(backend, file, max(5, options.repeats // 3))
        note = f"{pairs} pairs of 32 px"
        yield figure("encode", f"encoding for the small model, {what}", shares, 10.0, unit="%", note=note)
        if large:
            file = pairs_file(place / "large.parquet", large, edge=768)
            backend = with_large_autoencoder(place / "model", options.device)
            shares = encoding_shares(backend, file, 1)
            note = f"{large} pairs of 768 px, random weights"
            yield figure("encode", f"encoding at 512 px, {what}", shares, 10.0, unit="%", note=note)


def encoding_shares(backend: Backend, file: Path, repeats: int) -> list[float]:
    """That share, in %, of encodings of a parquet file's pairs, each into a fresh folder."""
    shares = []
    for _ in range(repeats):
        with timed(backend, "encode_images", "encode_text") as spent:
            took = seconds(lambda: encode_once(backend, file), backend.device)
        shares.append(100 * (1 - sum(spent.values()) / took))
    return shares


def encode_once(backend: Backend, file: Path) -> None:
    """As the command does it, into a folder that is gone afterwards."""
    with TemporaryDirectory(dir=file.parent) as name:
        encode_pairs(open_rows(str(file), "train"), backend, into=Path(name) / "store")


def pairs_file(path: Path, pairs: int, edge: int = 0) -> Path:
    """Some of the pairs that come with the workbench, as parquet.

    Args:
        edge: of the images, which are then JPEG, in pixels; 0 = as they are.
    """
    frame = pl.read_parquet(ASSETS / "pairs" / "train.parquet")
    frame = frame.filter(pl.col("label_0") != 0.5).head(pairs)
    if edge:
        frame = frame.with_columns(pl.col("jpg_0", "jpg_1").map_elements(partial(_enlarged, edge), pl.Binary))
    frame.write_parquet(path)
    return path


def _enlarged(edge: int, data: bytes) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").resize((edge, edge)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def with_large_autoencoder(place: Path, device: torch.device) -> Backend:
    """The small model with an untrained autoencoder of SD1.x's shape, 512 px."""
    from diffusers import AutoencoderKL

    small = fetch("embedded")
    small.copy_parts(place, without="vae")
    blocks = len(VAE["block_out_channels"])
    shape: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": 2,
        "latent_channels": small.number("vae", "latent_channels", 4, 1, 1024),  # those that the small denoiser takes
    }
    autoencoder: Any = AutoencoderKL(**VAE, **shape)
    autoencoder.save_pretrained(place / "vae")
    return models.load(str(place), device, resolution=512)


# Starting


def start(options: Options, runs: int = 10) -> Iterator[Figure]:
    """How long it takes until a command has said what it can do, each time in a fresh process."""
    took = in_turn(partial(_python, "workbench.sweep", "--help"), repeats=max(runs, options.repeats), warm=1)[0]
    yield figure("start", "python -m workbench.sweep --help", took, 0.5, unit="s", note="files in the system's cache")


def _python(*arguments: str) -> None:
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -m {' '.join(arguments)}: {done.stderr[-2000:]}")


# The report


def report(options: Options, runs: int = 50, command: bool = True) -> Iterator[Figure]:
    """All notebooks on a study of invented runs, in this process, whose imports are done; and what reading them takes.

    Args:
        command: whether the command that makes the page is timed too, once.
    """
    with folder(options.place) as name:
        place = Path(name)
        stores = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
            "WORKBENCH_STORAGE": f"sqlite:///{place / 'optuna.db'}",
        }
        with workplace(place, **stores, MPLBACKEND="agg"):
            invent("bench", runs)
            executed, _, _ = draw_all("bench", place / "warm")
            measured = [draw_all("bench", place / "figures")[1:] for _ in range(max(3, options.repeats // 5))]
            took, reading = np.array(measured).T
            note = f"{len(executed)} notebooks, {runs} runs"
            yield figure(
                "report", f"report of {runs} runs, warm interpreter: all figures", took, 30.0, unit="s", note=note
            )
            yield figure(
                "report",
                f"report of {runs} runs, warm interpreter: reading its data",
                reading,
                1.0,
                unit="s",
                note=note,
            )
            if command:
                whole = seconds(lambda: _python("workbench.report", "--study", "bench", "--out", str(place / "page")))
                yield figure(
                    "report", "python -m workbench.report", [whole], None, unit="s", note="a kernel a notebook"
                )


def draw_all(study: str, out: Path) -> tuple[list[str], float, float]:
    """Execute the code of all notebooks in this process, as if a person did.

    Returns:
        The notebooks whose runs the study has; seconds of all, and of these the reading of data.
    """
    begin, done = time.perf_counter(), []
    reads = ("load_runs", "load_history", "load_samples", "load_sheets")
    with timed(tracking, *reads) as runs, timed(results, "open_search", "read") as search:
        for path in sorted(shipped("notebooks").glob("*.ipynb")):
            try:
                _execute(nbformat.read(path, as_version=4), {"study": study, "out": str(out)})
                done.append(path.stem)
            except UserError:  # the study has no such runs
                pass
    return done, time.perf_counter() - begin, sum((runs | search).values())


def _execute(notebook: nbformat.NotebookNode, parameters: Mapping[str, Any]) -> None:
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__", "display": lambda shown: None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody sees the figures
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                names |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}
    plt.close("all")


def invent(study: str, runs: int, steps: int = 128) -> None:
    """A study of the claims' arms, each with some seeds, and of sampled trials: with all that runs keep, untrained."""
    settings = read(EXPERIMENTS / "claims.toml")
    space = read(EXPERIMENTS / "default.toml")["sweep.space"]
    seeds = list(range(max(1, runs // (len(settings["sweep.arms"]) + 1))))
    settings |= {"sweep.space": space, "sweep.trials": runs, "sweep.seeds": seeds}
    settings = settle(settings, {})
    config, client = resolve(settings), tracking.connect()
    url, rng = os.environ["WORKBENCH_STORAGE"], np.random.default_rng(0)
    with locked(url):
        search = lifecycle.open_study(config, settings, arms_of(config, settings), study, url)
    parent = study_runs.open_study(client, study, "")
    for _ in range(runs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody shows signs of life
            trial = search.ask()
        own = resolve(settings_of(trial, settings, read_space(config)))
        number, arm = trial.number, trial.user_attrs.get("arm", "sampled")
        name = trial.user_attrs.get("name", f"trial-{number}")
        about = {tags.KIND: "trial", tags.STUDY: study, tags.TRIAL: str(number)}
        tracker = tracking.Tracker(
            client, name, params=own.flat(), tags=about | {tags.ARM: arm}, parent=parent, flush=10**9
        )
        last = _tell(tracker, own, steps, rng)
        for metric in SHOWN:
            trial.set_user_attr(metric, last[metric])
        search.tell(trial, [last[metric] for metric in config.sweep.objectives])
        tracker.close("complete")
    study_runs.finish_study(client, parent, {}, "", "complete")


def _tell(tracker: tracking.Tracker, config: Config, steps: int, rng: np.random.Generator) -> dict[str, float]:
    """Tell what a run tells: metrics of all steps, samples and their scores, what the reference did."""
    names = sorted(metric_names(config))
    last: dict[str, float] = {}
    rare = [name for name in names if name.startswith(("validation/", "divergence/policy", "kl/policy"))]
    final = [name for name in names if name.startswith(("timestep_", "eval/", "divergence/reference_unseen"))]
    often = sorted({*names} - {*rare, *final})
    for step in range(1, steps + 1):
        told = often + (rare if step % 16 == 0 else []) + (final if step == steps else [])
        last |= dict(zip(told, rng.uniform(0.01, 1, len(told)).tolist(), strict=True))
        tracker.log(step, {name: last[name] for name in told})
    captions, draws = list(read_prompts("embedded")), config.evaluation.seeds
    scores = rng.normal(-2, 1, (4, draws * len(captions))).tolist()
    columns: dict[str, list] = {"caption": captions * draws, "seed": [seed for seed in range(draws) for _ in captions]}
    kinds = ("reward", "pretrained_reward", "judge", "pretrained_judge")
    tracker.table("samples.json", columns | dict(zip(kinds, scores, strict=True)))
    tracker.table("reference_audit.json", {"step": list(range(8, 8 * 16 + 1, 8)), "moved": [1.0] * 16})
    for file in ("samples.png", "pretrained.png"):
        tracker.picture(file, rng.integers(0, 256, (32 * draws, 32 * len(captions), 3), dtype=np.uint8))
    return last
