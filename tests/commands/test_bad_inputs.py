"""Bad input through the real commands: one line that names it, nothing written, no hang, no code run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from tests.support import bad_checkpoints, bad_data, bad_places, bad_scorers, bad_settings, bad_stores
from tests.support.bad_inputs import Place, files, limit, run, tracked
from tests.support.helpers import ROOT, pair_rows
from tests.support.reward_models import save_clip
from workbench.common.errors import UserError
from workbench.data.encoding import encode
from workbench.data.rows import decode, open_rows
from workbench.evaluation import scorers
from workbench.models import fetch, load
from workbench.training.experiment_file import load as load_settings

CASES = [*bad_settings.cases(), *bad_data.cases(), *bad_checkpoints.cases(), *bad_stores.cases(), *bad_places.cases()]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Tracking store, studies and cache that all cases share: to make them anew takes longer than most cases."""
    from workbench import tracking
    from workbench.tracking import study_runs

    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("WORKBENCH_STORAGE", f"sqlite:///{folder / 'optuna.db'}")
        patch.setenv("WORKBENCH_STATE", str(folder / "state"))
        patch.setenv("WORKBENCH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        study_runs.open_group(tracking.connect(), "made", "A study without runs.")
        made = optuna.create_study(study_name="made", storage=f"sqlite:///{folder / 'optuna.db'}")
        made.set_user_attr("definition", {})  # as the workbench's own studies have
        yield folder


@pytest.fixture(scope="module")
def encoded(tiny_model, tiny_pairs, stores):
    """A finished encoding of the tiny pairs."""
    backend = load(str(tiny_model), torch.device("cpu"))
    encode(open_rows(str(tiny_pairs), "train"), backend, into=stores / "store")
    return stores / "store"


@pytest.fixture
def place(tiny, encoded, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Place(folder, tiny, encoded)


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_it_is_one_line_and_nothing_is_written(bad, place, stores):
    command, *arguments = bad.make(place)
    before, runs = files(place.folder), tracked(stores / "mlflow.db")
    ended = run(command, *arguments)
    assert ended.code == bad.code, ended.output
    assert len(ended.errors) == 1 and len(ended.errors[0]) < 1100, ended.output
    assert ended.errors[0].isprintable() and all(text in ended.errors[0] for text in bad.says), ended.errors
    assert "Traceback" not in ended.output
    assert files(place.folder) == before and tracked(stores / "mlflow.db") == runs
    assert not list(stores.rglob("*.partial"))
    assert not (place.folder / bad_checkpoints.CANARY).exists()


#: As a user meets them: before torch is imported, and once it and all that reads a checkpoint and its data are.
OUTSIDE = ("settings: a key over several lines", "override: brackets without end")
OUTSIDE_AND_LATER = (
    "parquet: images of the system",
    "checkpoint: a part with code beside it",
    "store: a shard above the folder",
)

#: What `train` says of its work before it meets the mistake.
PROGRESS = re.compile(r"train-\d{4}-\d{6}-[0-9a-f]{8}: preparing: |encode pairs: ")
#: Runs commands as `python -m` does, in one interpreter, since each would import for seconds; prints their exit codes.
ONE_AFTER_THE_OTHER = """
import json, runpy, sys
for module, *words in json.loads(sys.argv[1]):
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        print("ended with", ended.code)
"""


@pytest.mark.parametrize("names", [OUTSIDE, OUTSIDE_AND_LATER], ids=["at once", "later"])
def test_in_a_process_of_their_own_all_that_they_say_is_their_lines(names, place):
    """No traceback, and nothing that a library says while it is imported or ends: the whole of standard error."""
    cases = [bad for bad in CASES if bad.name in names]
    asked = [bad.make(place) for bad in cases]
    before = files(place.folder)
    words = json.dumps([[f"workbench.{command}", *map(str, told)] for command, *told in asked])
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, words],
        cwd=place.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert len(said) == len(cases) == len(names), done.stderr
    for bad, line in zip(cases, said, strict=True):
        assert line.startswith("Error: ") and all(text in line for text in bad.says), line
    assert done.stdout.splitlines() == [f"ended with {bad.code}" for bad in cases]
    assert files(place.folder) == before


def test_there_are_enough_of_them_and_each_is_another():
    names = [bad.name for bad in CASES]
    assert len(names) >= 200 and len(set(names)) == len(names) and {*OUTSIDE, *OUTSIDE_AND_LATER} <= set(names)


# --- what is rare and right ----------------------------------------------------------------------------------------


def test_a_mark_at_the_beginning_and_an_empty_file_are_no_mistake(tmp_path):
    (tmp_path / "marked.toml").write_text("\ufeffseed = 3\n", "utf-8")
    (tmp_path / "empty.toml").touch()
    assert load_settings(tmp_path / "marked.toml").seed == 3 and load_settings(tmp_path / "empty.toml").seed == 0


def test_a_setting_in_a_table_is_the_same_as_by_its_name():
    by_name = load_settings(None, {"train.lr": 0.1, "sweep.arms": {"a": {"train.steps": 3}}})
    assert load_settings(None, {"train": {"lr": 0.1}, "sweep": {"arms": {"a": {"train.steps": 3}}}}) == by_name


@pytest.mark.parametrize("name", bad_data.ODD)
def test_rare_images_are_used(name):
    pair = decode(pair_rows(1)[0] | {"jpg_1": bad_data.ODD[name]()}, 32)
    assert pair is not None and pair.w.shape == pair.l.shape == (32, 32, 3)
    winner = pair.w if pair_rows(1)[0]["label_1"] == 1 else pair.l
    assert name == "one pixel" or winner.std() > 20


def test_images_of_16_bits_keep_their_range():
    row = pair_rows(1)[0]
    pair = decode(row | {column: bad_data.ODD["16 bits"]() for column in ("jpg_0", "jpg_1")}, 32)
    assert np.ptp(pair.w) > 200 and 100 < pair.w.mean() < 155


def test_a_file_may_be_called_like_a_pattern(tiny_pairs, tmp_path):
    shutil.copy(tiny_pairs, tmp_path / "pairs[1]*.parquet")
    assert sum(len(rows) for rows, _ in open_rows(str(tmp_path / "pairs[1]*.parquet"), "train").chunks(50)) == 24


def test_a_copied_checkpoint_has_the_files_of_its_parts_and_no_others(place):
    (place.model / "vae" / "loop").symlink_to("..")
    (place.model / "vae" / "more").mkdir()
    fetch(str(place.model)).copy_parts(place.folder / "copy", without="unet")
    copied = {str(path.relative_to(place.folder / "copy")) for path in (place.folder / "copy").rglob("*")}
    assert "vae/config.json" in copied and not any(name.startswith(("unet", "vae/loop", "vae/more")) for name in copied)


# --- reward models, which are loaded after images were drawn -------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))[0]


@pytest.mark.parametrize(
    ("name", "broken"),
    [(name, broken) for name, found in bad_scorers.BROKEN.items() for broken in found],
    ids=lambda text: text,
)
def test_a_broken_reward_model_is_one_line(name, broken, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, says = bad_scorers.BROKEN[name][broken]
    make(tmp_path / "scorer", clip)
    with pytest.raises(UserError) as caught, limit(60):
        scorers.locate(name, str(tmp_path / "scorer")).load(torch.device("cpu"))
    assert says in str(caught.value) and str(caught.value).isprintable()
    assert not (tmp_path / bad_checkpoints.CANARY).exists()


# --- code that would run code --------------------------------------------------------------------------------------

RUNNING = ("eval", "exec", "np.load", "yaml.load", "yaml.unsafe_load", "joblib.load", "pd.read_pickle")
#: The benchmark times the code of the notebooks that come with the workbench.
OWN_NOTEBOOKS = (ROOT / "workbench" / "benchmarks" / "report.py", "exec")
#: Where something that is no network is read, so that there are no weights that could be pickled.
NO_NETWORKS = {"load_scheduler", "_load_part", "_clip_tokenizer", "_imagereward"}


def calls(path: Path):
    """Every call in a module: the function it stands in, its own name with what is before it, its constant keywords."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call):
                    told = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
                    yield function.name, ast.unparse(call.func), told


@pytest.mark.parametrize("path", sorted((ROOT / "workbench").rglob("*.py")), ids=lambda path: path.name)
def test_no_module_can_run_what_a_file_holds(path):
    for inside, name, told in calls(path):
        last = name.rpartition(".")[2]
        assert name != "torch.load" or told.get("weights_only") is True, f"{inside}: {name}"
        assert last != "from_pretrained" or told.get("local_files_only") is True, f"{inside}: {name}"
        if last == "from_pretrained" and inside not in NO_NETWORKS:
            assert told.get("use_safetensors") is True, f"{inside}: {name}"
        assert not told.get("trust_remote_code") and not told.get("allow_pickle"), f"{inside}: {name}"
        if (path, name) != OWN_NOTEBOOKS:
            assert name not in RUNNING, f"{inside}: {name}"
    statements = list(ast.walk(ast.parse(path.read_text())))
    modules = {alias.name for x in statements if isinstance(x, ast.Import) for alias in x.names}
    taken = {a.name for x in statements if isinstance(x, ast.ImportFrom) and x.module == "pickle" for a in x.names}
    assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & modules and taken <= {"UnpicklingError"}
