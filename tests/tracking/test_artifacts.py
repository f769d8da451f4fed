"""Where artifacts go: checked before training, and changed when a project folder was moved or copied."""

import os
import shutil
import sqlite3
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlflow
import pytest

from tests.support.commands import invoke
from tests.support.helpers import workbench
from workbench import tracking
from workbench.common import processes
from workbench.common.errors import Failure, UserError
from workbench.studies.relocation import moved_paths, relocate
from workbench.tracking import artifacts, store, tags
from workbench.training import preparation

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def enter(monkeypatch):
    """Go to a folder, as a new process would: MLflow notes the store that it has opened in the environment."""

    def go(folder):
        monkeypatch.chdir(folder)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    return go


@pytest.fixture
def project(workplace, enter):
    """A project folder with a run and its history."""
    folder = workplace / "project"
    folder.mkdir()
    (workplace / "mlflow.db").rename(folder / "mlflow.db")
    enter(folder)
    run = tracking.Tracker(tracking.connect(), "run", params={}, tags={})
    run.log(1, {"a": 1.0})
    run.close("complete")
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder) for path in (folder / "mlruns").rglob("*") if path.is_file())


def test_artifacts_of_a_moved_project_are_found_again_after_relocate(project, workplace, enter):
    moved = workplace / "moved to"
    project.rename(moved)
    enter(moved)
    client = tracking.connect()
    wanted = rf"was moved or copied from {project} to {moved}.*study relocate {project} '{moved}'"
    with pytest.raises(Failure, match=wanted):
        tracking.Tracker(client, "late", params={}, tags={})
    assert not project.exists()  # nothing was made there
    done = workbench("workbench.study", "relocate", str(project), str(moved), cwd=moved)
    assert done.returncode == 0 and "artifact locations of runs" in done.stdout, done.stderr
    run = tracking.Tracker(client, "late", params={}, tags={})
    run.log(1, {"a": 2.0})
    run.close("complete")
    assert len(files_of(moved)) == 2 and not project.exists()
    for found in client.search_runs([store.experiment(client).experiment_id]):
        assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["history.parquet"]


def test_a_copied_project_does_not_write_into_the_original(project, workplace, enter):
    before = files_of(project)
    copy = workplace / "copy"
    shutil.copytree(project, copy)
    enter(copy)
    client = tracking.connect()
    with pytest.raises(Failure, match="was moved or copied"):
        tracking.Tracker(client, "late", params={}, tags={})
    assert invoke("study", "relocate", project, ".").returncode == 0
    run = tracking.Tracker(client, "late", params={}, tags={})
    run.log(1, {"a": 2.0})
    run.close("complete")
    assert files_of(project) == before and len(files_of(copy)) == 2


def test_a_store_from_before_its_place_was_noted_is_taken_as_it_is_unless_its_folder_is_gone(project, workplace, enter):
    with sqlite3.connect(project / "mlflow.db") as database:
        database.execute("DELETE FROM experiment_tags WHERE key = ?", (tags.STORE,))
    client = tracking.connect()
    shutil.copytree(project, workplace / "copy")
    artifacts.check_artifacts(client)
    assert store.experiment(client).tags[tags.STORE] == str(project / "mlflow.db")
    shutil.rmtree(project)
    enter(workplace / "copy")
    with pytest.raises(Failure, match="was moved or copied"):
        artifacts.check_artifacts(tracking.connect())


def test_an_artifact_place_that_cannot_be_written_is_found_before_training(project, monkeypatch):
    shutil.rmtree(project / "mlruns")
    (project / "mlruns").write_text("a file")
    with pytest.raises(Failure, match=r"artifacts of this tracking store go to .*mlruns, which cannot be written"):
        tracking.Tracker(tracking.connect(), "late", params={}, tags={})
    refused = invoke("sweep", "--trials", 1)
    assert refused.returncode == 1 and "cannot be written" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (project / "optuna.db").exists()
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "prepare", lambda config: pytest.fail("encodes pairs for hours"))
        refused = invoke("train")
    assert refused.returncode == 1 and "cannot be written" in refused.stderr and refused.stderr.count("\n") == 1


def test_whether_a_run_can_be_tracked_is_asked_without_making_a_store(workplace, enter, monkeypatch, somebody_else):
    folder = workplace / "new"
    folder.mkdir()
    enter(folder)
    artifacts.require_trackable()
    refused = invoke("train", "--set", "data.train=nowhere.parquet", WORKBENCH_STATE=str(workplace / "state"))
    assert refused.returncode == 2 and "nowhere.parquet" in refused.stderr and not [*folder.iterdir()]
    somebody_else()
    with pytest.raises(Failure, match=r"new/mlflow\.db: cannot be made, since \S*/new cannot be written \(Permission"):
        artifacts.require_trackable()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace / 'nowhere' / 'x.db'}")
    with pytest.raises(Failure, match=r"x\.db: cannot be made, .*No such file"):
        artifacts.require_trackable()


class Leaving(BaseHTTPRequestHandler):
    """A tracking server that answers whoever connects to it, and nothing that is asked afterwards."""

    def do_GET(self):
        self.answer(200 if self.path == "/health" else 503)

    def do_POST(self):
        self.answer(200 if self.path.endswith("/experiments/search") else 503)

    def answer(self, status):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_server_that_goes_away_before_the_training_is_one_line(workplace, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Leaving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(preparation, "prepare", lambda config: pytest.fail("encodes pairs for hours"))
    for command in (("train",), ("sweep", "--trials", 1)):
        refused = invoke(*command)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
        assert refused.stderr.startswith("Error: the tracking store is away ("), refused.stderr
    server.shutdown()


def test_doctor_mends_nothing_of_a_copy_whose_artifacts_would_go_to_the_original(project, workplace, enter):
    dead = processes.this_process().replace(f"|{os.getpid()}|", "|999999|")
    run = tracking.connect().create_run("1", tags={tags.KIND: "run", tags.PROCESS: dead})
    shutil.copytree(project, workplace / "copy")
    enter(workplace / "copy")
    looked, done = invoke("study", "doctor", "--dry-run"), invoke("study", "doctor")
    assert looked.returncode == 1 and "cannot be mended  this tracking store was moved or copied" in looked.stdout
    assert f"to mend           run {run.info.run_name}: is RUNNING" in looked.stdout
    assert done.returncode == 1 and "this tracking store was moved or copied" in done.stderr and not done.stdout
    assert tracking.connect().get_run(run.info.run_id).info.status == "RUNNING"


def test_a_server_that_does_not_pass_artifacts_on_is_named_with_the_option_that_it_lacks(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    with pytest.raises(Failure, match=r"--artifacts-destination PATH.*study relocate /srv/mlruns mlflow-artifacts:/"):
        artifacts._require_shared(artifacts.local_path("/srv/mlruns"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    artifacts._require_shared(artifacts.local_path("/srv/mlruns"))
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to its database"):
        artifacts.relocate("/a", "/b")


@pytest.mark.parametrize(
    ("location", "old", "new", "moved"),
    [
        ("file:///a/mlruns/1", "/a", "/b c", "file:///b%20c/mlruns/1"),
        ("/a/mlruns", "/a/", "/b", "/b/mlruns"),
        ("file:///ab/mlruns", "/a", "/b", None),
        ("/srv/mlruns/1/x/artifacts", "/srv/mlruns", "mlflow-artifacts:/", "mlflow-artifacts:/1/x/artifacts"),
        ("/srv/mlruns", "/srv/mlruns", "mlflow-artifacts:/", "mlflow-artifacts:/"),
        ("s3://one/x/1", "s3://one", "s3://two/y", "s3://two/y/x/1"),
        (None, "/a", "/b", None),
    ],
)
def test_locations_below_a_folder_or_address_follow_it(location, old, new, moved):
    assert artifacts._moved_location(location, old, new) == moved


def test_paths_in_settings_follow_and_other_texts_do_not():
    settings = {
        "data.train": "/a/pairs.parquet",
        "model.path": "/ab",
        "sweep.arms": {"x": {"data.train": "/a"}},
        "n": 1,
    }
    assert moved_paths(settings, "/a", "/b") == {
        "data.train": "/b/pairs.parquet", "model.path": "/ab", "sweep.arms": {"x": {"data.train": "/b"}}, "n": 1,
    }  # fmt: skip


def test_a_study_resumes_after_its_project_was_moved(tiny, workplace, enter):
    """Settings of the study, of its waiting trials, and of a snapshot name files in the folder."""
    from workbench.common.paths import storage_url
    from workbench.studies import lifecycle, recovery, storage
    from workbench.studies.experiment import Experiment
    from workbench.training.snapshots import Snapshot, Snapshots

    old, new = workplace / "old", workplace / "new"
    old.mkdir()
    (workplace / "mlflow.db").rename(old / "mlflow.db")
    (old / "prompts.txt").write_text("a dog")
    enter(old)
    declared = tiny | {"data.prompts": str(old / "prompts.txt"), "sweep.trials": 0}
    arms = {"one": {"data.validation": str(old / "pairs.parquet")}}
    study, _, _ = lifecycle.start(
        Experiment.resolve(declared | {"sweep.arms": arms}), "s", storage_url(), tracking.connect(), ExitStack()
    )
    settings = study.user_attrs["settings"]
    Snapshots(recovery.snapshot_folder(study, 0)).save(Snapshot(4, {}, settings=settings))
    old.rename(new)
    enter(new)
    assert len(list(relocate(str(old), str(new), storage_url()))) == 4
    study = storage.require_study("s", storage_url())
    again = lifecycle.stored_experiment(study)
    assert again.config.data.prompts == str(new / "prompts.txt")
    assert study.get_trials()[0].user_attrs["overrides"]["data.validation"] == str(new / "pairs.parquet")
    kept = Snapshots(recovery.snapshot_folder(study, 0)).newest()
    assert kept.settings["data.prompts"] == str(new / "prompts.txt")
    lifecycle.start(again, "s", storage_url(), tracking.connect(), ExitStack())
    assert mlflow.get_tracking_uri().endswith("new/mlflow.db")
