"""Shared fixtures: a tiny random Stable Diffusion folder and tiny preference pairs, made here, no network."""

import functools
import gc
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import alembic.util.pyfiles
import hypothesis
import polars as pl
import pytest
import torch

import tests.support.unsynced  # noqa: F401
from tests.support.forked import forked_workers  # noqa: F401
from tests.support.helpers import ROOT, pair_rows, random_text_encoder

gc.disable()  # until all tests are collected
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = str(ROOT)  # processes that tests start import this tree
# The same examples each time, so that a change is judged by what it changed; `make test-all` looks for new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("new", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")
torch.set_num_threads(1)
load_anew, load_once = alembic.util.pyfiles.load_module_py, functools.cache(alembic.util.pyfiles.load_module_py)
# MLflow and Optuna ask for the newest of their migrations, each a file, whenever a database is opened. The env.py
# beside them must run each time: it is what migrates.
alembic.util.pyfiles.load_module_py = lambda name, path: (load_anew if name == "env_py" else load_once)(name, path)
#: Files with tests of five seconds of CPU and more. They come first: a long test that is begun last keeps one of two
#: workers waiting for the other.
LONG = (
    "commands/test_bad_bytes.py", "commands/test_commands.py", "models/small/test_shipped.py",
    "benchmarks/test_invented_study.py", "benchmarks/test_throughput.py", "benchmarks/test_plan.py",
    "analysis/claims/test_claims.py", "evaluation/test_evaluate.py", "studies/test_rounds.py",
    "benchmarks/test_step.py",
)  # fmt: skip
assert all((ROOT / "tests" / name).is_file() for name in LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))  # stable: all others stay in their order


@pytest.hookimpl(tryfirst=True)  # before xdist's, which runs all tests; its controller collects none and comes here too
def pytest_runtestloop() -> None:
    """Leave the million objects of imported libraries out of garbage collection, which took an eighth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random-weight checkpoint folder of the small model's format, far smaller."""
    from tests.support.families import autoencoder, unet
    from workbench.models.small.denoiser import save_model

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vae, denoiser = autoencoder(4), unet(cross_attention_dim=64)
    tokenizer, text_encoder = random_text_encoder()
    save_model(folder, vae, torch.nn.ModuleDict({"unet": denoiser, "text_encoder": text_encoder}), tokenizer, 1.0)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a real family's tiny checkpoint by its name, made when it is first asked for. To be read only."""
    from tests.support.families import make

    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda name: make(name, root / name))


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory) -> Path:
    """A parquet file of 24 usable pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pl.DataFrame(pair_rows(24)).write_parquet(path)
    return path


@pytest.fixture
def no_plugins(monkeypatch):
    """A process that has met no function of the user's own, at the end again."""
    from workbench.training import config, plugins

    monkeypatch.setenv(plugins.VARIABLE, "")
    tables = [table for _, table, _ in config.CHOICES.values()]
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory) -> Path:
    """A file of four of the small model's test prompts."""
    from workbench.models.small.prompts import split

    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(str(p) for p in random.Random(0).sample(split()["test"], 4)))
    return path


@pytest.fixture
def tiny(tiny_model, tiny_pairs, tiny_prompts) -> dict:
    """Dotted settings of a run that takes a second; the same in every test, so that tests may share what runs share."""
    return {
        "model.path": str(tiny_model),
        "data.train": str(tiny_pairs),
        "data.validation": str(tiny_pairs),
        "data.prompts": str(tiny_prompts),
        "train.steps": 4,
        "train.batch_size": 4,
        "train.lr": 1e-3,
        "diagnostics.interval": 2,
        "diagnostics.probe": 16,
        "diagnostics.draws": 2,
        "reference.interval": 2,
        "evaluation.seeds": 1,
        "evaluation.steps": 2,
        "evaluation.grid": 4,
    }


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A tracking store with its tables, which take seconds to make, and nothing in them."""
    from workbench import tracking

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.connect()
    return path


@pytest.fixture
def workplace(tmp_path, monkeypatch, empty_store) -> Path:
    """A working folder of its own: tracking store, study storage and cache."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE", "WORKBENCH_STATE", "WORKBENCH_GRACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def brief_epochs(monkeypatch) -> None:
    """Hugging Face's datasets wait five seconds at the end of a shuffled epoch, for threads that tests do not have."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def somebody_else(tmp_path):
    """Go on as a user who owns nothing here."""
    if os.geteuid():
        pytest.skip("another user can only be played by root")
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)

    def become():
        os.seteuid(65534)

    yield become
    os.seteuid(0)
