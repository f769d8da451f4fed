"""Files as the umask says, and no file that cannot be read taken for a damaged one."""

import ast
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import save_file

import workbench
from tests.support.commands import invoke
from workbench import tracking
from workbench.common import cache, files, locks
from workbench.common.errors import Failure, UserError
from workbench.common.files import in_place, require_readable
from workbench.common.outputs import require_own
from workbench.common.paths import places_explained, require_places, sqlite_url
from workbench.studies.storage import open_storage, require_writable
from workbench.tracking.artifacts import check_artifacts
from workbench.training.config import resolve
from workbench.training.model_folder import ModelFolder
from workbench.training.run_folder import run_in
from workbench.training.snapshots import Snapshot, Snapshots

PACKAGE = Path(workbench.__file__).parent


@pytest.fixture
def umask():
    """Set the umask for this test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_follow_the_umask(mask, mode, umask, tmp_path, monkeypatch):
    umask(mask)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    cache.cached("kind", "key", lambda: {"x": torch.zeros(2)})
    with in_place(tmp_path / "model") as partial:
        (partial / "unet").mkdir(parents=True)
        save_file({"x": torch.zeros(2)}, partial / "unet" / "weights.safetensors")
        (partial / "config.json").write_text("{}")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3 and {path.stat().st_mode & 0o777 for path in written} == {mode}


def test_databases_and_locks_follow_the_umask(umask, tmp_path, monkeypatch):
    """Colleagues who share a folder work on the same studies."""
    umask(0o002)
    url = sqlite_url(tmp_path / "optuna.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_url(tmp_path / "mlflow.db"))
    with locks.exclusive(url), locks.try_use(url, "token", alone=False), locks.try_lock(tmp_path / "runs"):
        open_storage(url)
    tracking.connect()
    written = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_file()}
    assert {"optuna.db", "optuna.db.lock", "optuna.db.token.lock", "runs.lock", "mlflow.db"} <= written.keys()
    assert set(written.values()) == {0o664}, written


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, somebody_else):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    snapshots = Snapshots(tmp_path / "run")
    snapshots.save(Snapshot(1, {"weights": torch.zeros(2)}))
    cache.cached("kind", "key", lambda: {"x": torch.zeros(2)})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for file in files:
        file.chmod(0o600)
        file.parent.chmod(0o777)
    somebody_else()
    with pytest.raises(Failure, match=r"\.snapshot: cannot be read \(Permission denied\); let this user read it, or"):
        snapshots.newest()
    with pytest.raises(Failure, match=r"\.safetensors: cannot be read \(Permission denied\).*set WORKBENCH_CACHE"):
        cache.cached("kind", "key", dict)
    with pytest.raises(Failure, match=r"cannot be read \(Permission denied\); let this user read it, or ask"):
        require_readable(files[0], "ask")
    assert all(file.exists() for file in files)


@pytest.mark.parametrize("variable", ["WORKBENCH_STATE", "WORKBENCH_CACHE"])
def test_a_place_that_cannot_be_written_is_found_first_and_names_its_variable(variable, workplace, monkeypatch):
    require_places()
    monkeypatch.setenv(variable, "/proc/nowhere")
    with pytest.raises(Failure, match=rf"/proc/nowhere: cannot be used .* or set {variable} to another folder"):
        require_places()


def test_a_home_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, somebody_else):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    (tmp_path / ".cache").mkdir(mode=0o755)
    somebody_else()
    line = r"huggingface: cannot be used \(Permission denied\); .* set HF_HOME to another folder"
    with pytest.raises(Failure, match=line), places_explained():
        (tmp_path / ".cache" / "huggingface").mkdir()


# --- how the code itself writes files -------------------------------------------------------------------------


def trees():
    """Every file of the package, and its syntax."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree):
    """Every call of a function or method by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield node


def test_every_text_file_is_opened_with_its_encoding():
    """Ruff's rule of this sees only what it knows to be a path."""
    bare = []
    for path, tree in trees():
        for node in calls(tree):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            before = {"read_text": 0, "write_text": 1}.get(name)  # arguments before the encoding
            if before is not None and len(node.args) <= before and "encoding" not in {k.arg for k in node.keywords}:
                bare.append(f"{path}:{node.lineno}")
    assert not bare


#: What writes a file, by its name: the place of the path among the arguments; None = it is called on the path.
WRITERS = {
    "write_text": None, "write_bytes": None, "savefig": 0, "write_csv": 0, "write_parquet": 0, "to_csv": 0,
    "to_parquet": 0, "write_table": 1, "save_file": 1,
}  # fmt: skip
#: What hands out a path whose file is moved into place, or goes with its folder.
HANDED_OUT_BY = {"in_place", "partial_file", "output_file", "file", "_file", "TemporaryDirectory", "temporary_folder"}
#: Where files are written otherwise: only whoever builds the small model anew, or makes a checkpoint of random numbers,
#: writes them, and a kill there is seen.
ELSEWHERE = ("models/small/", "models/random_weights.py")


def written_at(node):
    """The expression of the path that a call writes to; None where it writes none."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
    if name not in WRITERS:
        return None
    if WRITERS[name] is None:
        return node.func.value
    return node.args[WRITERS[name]] if len(node.args) > WRITERS[name] else None


def handed_out(tree):
    """Names of paths that may be written to: those that a context manager made, and parameters of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            for item in node.items:
                called = getattr(item.context_expr, "func", None)
                if getattr(called, "attr", getattr(called, "id", "")) in HANDED_OUT_BY and item.optional_vars:
                    yield ast.unparse(item.optional_vars)
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            yield from (argument.arg for argument in node.args.args)


def test_every_file_is_written_beside_its_place_and_moved_there():
    elsewhere = []
    for path, tree in trees():
        names = set(handed_out(tree))
        for node in calls(tree):
            place = written_at(node)
            if place is not None and ast.unparse(place) not in names and not path.startswith(ELSEWHERE):
                elsewhere.append(f"{path}:{node.lineno}: {ast.unparse(place)}")
    assert not elsewhere


def test_what_is_no_file_is_not_opened_in_the_place_of_the_workbenchs_own(tmp_path):
    """Whoever opens a named pipe waits; a test that hangs here has failed."""
    for name in ("00000002-abc.snapshot", "finished.json", "model.json", "run.json", ".workbench-files"):
        os.mkfifo(tmp_path / name)
    assert Snapshots(tmp_path).newest() is None and Snapshots(tmp_path).finished() is None
    assert not ModelFolder(tmp_path, tmp_path, resolve({})).has_model
    assert run_in(tmp_path) is None
    with pytest.raises(UserError, match="is no file"):
        require_own(tmp_path, "report.html")


def test_a_study_database_that_may_not_be_written_is_one_line(tmp_path, somebody_else):
    url = sqlite_url(tmp_path / "optuna.db")
    require_writable(url)  # it is not there yet
    (tmp_path / "optuna.db").touch()
    (tmp_path / "optuna.db").chmod(0o444)
    somebody_else()
    with pytest.raises(Failure, match=r"optuna\.db: cannot be written \(Permission denied\)"):
        require_writable(url)


@pytest.mark.parametrize("lock", ["optuna.db.lock", "optuna.db.0123456789ab.lock"])
def test_the_locks_of_a_study_database_are_asked_for_too_and_the_remedy_has_all(lock, tmp_path, somebody_else):
    folder = tmp_path / "of [two] words"
    folder.mkdir(mode=0o755)
    for name, mode in (("optuna.db", 0o666), (lock, 0o644)):
        (folder / name).touch()
        (folder / name).chmod(mode)
    somebody_else()
    with pytest.raises(Failure) as error:
        require_writable(sqlite_url(folder / "optuna.db"))
    assert f"{lock}: cannot be written (Permission denied); let this user: chmod g+rw '{folder}/optuna.db'*" in str(
        error.value
    )


def test_looking_whether_a_database_may_be_written_leaves_its_locks(tmp_path):
    """Closing any descriptor of a file would drop those of this process, and another's write would be lost."""
    with closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as held:
        held.execute("create table t (x)")
        held.execute("begin immediate")
        require_writable(sqlite_url(tmp_path / "s.db"))
        write = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0.1).execute('insert into t values (1)')"
        other = subprocess.run([sys.executable, "-c", write, tmp_path / "s.db"], capture_output=True, text=True)
    assert "database is locked" in other.stderr


@pytest.mark.parametrize("command", [("sweep",), ("study", "forget", "s", 0, "--yes"), ("study", "doctor")])
def test_commands_that_change_a_study_ask_first_whether_they_may(command, workplace, monkeypatch):
    study = optuna.create_study(study_name="s", storage=sqlite_url(workplace / "optuna.db"))
    study.set_user_attr("token", "0" * 12)
    study.set_user_attr("definition", {})

    def refuse(path, *_):
        raise Failure(f"{path.name}: cannot be written")

    monkeypatch.setattr(files, "require_writable", refuse)
    refused = invoke(*command)
    assert refused.returncode == 1 and refused.stderr == "Error: optuna.db: cannot be written\n"


def test_a_tracking_store_that_may_not_be_written_is_one_line(workplace, somebody_else):
    (workplace / "mlflow.db").chmod(0o444)
    client = tracking.connect()
    somebody_else()
    with pytest.raises(Failure, match=r"mlflow\.db: cannot be written \(Permission denied\)"):
        check_artifacts(client)
