"""Whose a study, and whose a run is: nothing that another study made is changed, and lost ones are recognised."""

import shutil
import sqlite3
from contextlib import ExitStack
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from tests.support.commands import invoke
from workbench import tracking
from workbench.common.errors import Failure, UserError
from workbench.common.paths import storage_place, storage_url
from workbench.common.processes import this_process
from workbench.studies import lifecycle, records, recovery, results
from workbench.studies.doctor import Doctor
from workbench.studies.experiment import Experiment
from workbench.studies.ownership import statuses
from workbench.studies.storage import create_whole, locked, names, open_storage, own_studies, require_study
from workbench.tracking import reconcile, study_runs, tags

pytestmark = pytest.mark.filterwarnings("ignore")
SPACE = {"train.lr": {"type": "FloatDistribution", "low": 1e-5, "high": 1e-4}}
EXPERIMENT = Experiment.resolve({"sweep.trials": 3, "sweep.space": SPACE, "sweep.arms": {"one": {}}})


@pytest.fixture
def person(workplace, monkeypatch):
    """Become one of several people who have folders of their own and one tracking store."""

    def become(name):
        folder = workplace / name
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("WORKBENCH_STORAGE", f"sqlite:///{folder / 'optuna.db'}")
        monkeypatch.setenv("WORKBENCH_STATE", str(folder / "state"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace / 'mlflow.db'}")
        return folder

    return become


def begun(name="s"):
    """A study that was started, as its command has it."""
    client = tracking.connect()
    return (client, *lifecycle.start(EXPERIMENT, name, storage_url(), client, ExitStack()))


def run_trial(client, study, own, parent, state="complete", tell=True):
    """A trial and its run, without training."""
    trial = study.ask()
    about = {tags.KIND: "trial", tags.STUDY: own.name, tags.TOKEN: own.token, tags.TRIAL: str(trial.number)}
    run = tracking.Tracker(client, f"trial-{trial.number}", params={}, tags=about, parent=parent)
    records.write(trial, process=this_process(), run_id=run.run_id)
    if tell:
        study.tell(trial, 0.5)
        run.close(state)
    return run.run_id


def everything(client):
    """All that the tracking store says about runs, deleted ones too."""
    number = tracking.store.experiment(client).experiment_id
    runs = client.search_runs([number], run_view_type=3)
    return {run.info.run_id: (run.info.status, dict(run.data.tags), dict(run.data.metrics)) for run in runs}


def examined(client, dry_run=False):
    """What doctor finds of study s, apart from that no command works on it."""
    found = Doctor(client, storage_url(), dry_run).examine("s")
    return [finding for finding in found if "nobody works on it" not in finding.what]


# --- a study that somebody else made -------------------------------------------------------------------------


@pytest.fixture
def foreign(workplace):
    """Somebody's own Optuna study, with our name for the key of a token, finished trials and one that runs."""
    storage = f"sqlite:///{workplace / 'optuna.db'}"
    study = optuna.create_study(study_name="s", storage=storage)
    study.set_user_attr("token", 7)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    study.ask()
    return study


def test_a_foreign_study_of_the_same_name_is_refused_and_left_as_it_is(foreign, workplace):
    before = [(t.state, t.params, t.user_attrs) for t in foreign.get_trials()]
    with pytest.raises(UserError, match=r"study 's' of .*optuna\.db was not made by the workbench .*--study NAME"[:60]):
        begun()
    url = storage_url()
    for look in (lambda: require_study("s", url), lambda: results.open_search("s")):
        with pytest.raises(UserError, match="was not made by the workbench"):
            look()
    assert names(url) == []
    assert [(t.state, t.params, t.user_attrs) for t in foreign.get_trials()] == before


def test_commands_pass_over_foreign_studies(foreign, workplace):
    begun("mine")
    assert invoke("study", "doctor").returncode == 0
    shown = invoke("study", "status")
    assert "Study mine" in shown.stdout and "Study s:" not in shown.stdout
    refused = invoke("study", "doctor", "s")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert [t.state.name for t in foreign.get_trials()] == ["COMPLETE"] * 3 + ["RUNNING"]


def test_a_study_is_created_whole_or_not_at_all(workplace):
    url = storage_url()

    def killed(draft):
        draft.enqueue_trial({})
        raise KeyboardInterrupt

    with locked(url):
        storage = open_storage(url)
        with pytest.raises(KeyboardInterrupt):
            create_whole("s", storage, "0123456789ab", ["maximize"], killed)
        assert own_studies(storage) == {} and len(optuna.get_all_study_names(storage)) == 1
    begun()
    assert optuna.get_all_study_names(open_storage(url)) == ["s"]


# --- two people, one tracking store, one name ----------------------------------------------------------------


def test_studies_of_one_name_in_one_store_do_not_touch_each_other(person, capsys):
    person("ada")
    client, hers, her_id, her_run = begun()
    run_trial(client, hers, her_id, her_run)
    at_work = run_trial(client, hers, her_id, her_run, tell=False)
    before = everything(client)
    person("bob")
    client, his, his_id, his_run = begun()
    assert "has another study called 's'" in capsys.readouterr().out
    assert his_id.token != her_id.token and his_run != her_run
    run_trial(client, his, his_id, his_run)
    his.tell(his.ask(), state=TrialState.FAIL)  # number 1, as is her trial that runs
    reconcile.reconcile_runs(client, his_run, statuses(his))
    list(Doctor(client, storage_url(), False).examine())
    lifecycle.finish_study(his, client, his_run, EXPERIMENT)
    after = everything(client)
    assert {run_id: after[run_id] for run_id in before} == before
    assert client.get_run(at_work).info.status == "RUNNING"


def test_a_name_means_the_study_of_this_database_and_an_address_any(person):
    person("ada")
    client, study, her_id, parent = begun()
    run_trial(client, study, her_id, parent)
    person("bob")
    client, study, his_id, parent = begun()
    run_trial(client, study, his_id, parent)
    run_trial(client, study, his_id, parent)
    assert len(tracking.load_runs("s")) == 2 == len(tracking.load_runs(his_id.address))
    assert len(tracking.load_runs(her_id.address)) == 1
    assert study_runs.study_names(client) == ["s", her_id.address]
    assert her_id.token in tracking.ui_link(client, her_id.address)
    person("eve")
    with pytest.raises(UserError, match="study 's': 2 studies have this name, say which: s@") as error:
        tracking.load_runs("s")
    assert her_id.address in str(error.value) and his_id.storage in str(error.value)


def test_nothing_is_attached_or_added_to_anothers_study(person, caplog):
    folder = person("ada")
    begun()
    person("bob")
    client = tracking.connect()
    before = everything(client)
    (folder / "figure.png").write_bytes(b"x")
    assert not tracking.attach("s", folder / "figure.png") and "not attached" in caplog.text
    with pytest.raises(UserError, match=r"has its trials in .*ada/optuna\.db.*choose another --study name"):
        study_runs.open_group(client, "s", "")
    assert everything(client) == before


def test_checks_of_two_studies_of_one_name_are_apart(person):
    person("ada")
    client = tracking.connect()
    her_id, his_id = study_runs.StudyId("s-checks", "a" * 12), study_runs.StudyId("s-checks", "b" * 12)
    parent = study_runs.open_study(client, her_id, "")
    about = {tags.STUDY: her_id.name, tags.TOKEN: her_id.token}
    run = tracking.Tracker(client, "seed-0", params={}, tags=about, parent=parent)
    assert reconcile.complete_runs(client, his_id) == {} == reconcile.complete_runs(client, her_id)
    assert client.get_run(run.run_id).info.status == "RUNNING"  # its process lives
    run.close("complete")
    assert [*reconcile.complete_runs(client, her_id)] == ["seed-0"]


def test_dead_runs_of_another_state_folder_are_left_to_it(person):
    gone = this_process().replace("|", "|9", 1)
    person("ada")
    client = tracking.connect()
    run = tracking.Tracker(client, "single", params={}, tags={tags.KIND: "run"})
    client.set_tag(run.run_id, tags.PROCESS, gone)
    person("bob")
    assert reconcile.close_dead_runs(client) == []
    person("ada")
    assert reconcile.close_dead_runs(client) == ["run single: is RUNNING, its process is gone"]
    run.close("interrupted")


# --- studies made before there were tokens -------------------------------------------------------------------


def forget_tokens(client):
    """As an earlier version would have left the tracking store."""
    for run_id, (_, known, _) in everything(client).items():
        for key in {tags.TOKEN, tags.STORAGE, tags.STATE_FOLDER} & known.keys():
            client.delete_tag(run_id, key)


def test_an_older_study_is_adopted_with_its_runs(person):
    person("ada")
    client, study, own, parent = begun()
    run_id = run_trial(client, study, own, parent)
    forget_tokens(client)
    again = lifecycle.start(EXPERIMENT, "s", storage_url(), client, ExitStack())
    assert again[1:] == (own, parent)
    assert client.get_run(run_id).data.tags[tags.TOKEN] == own.token
    assert len(everything(client)) == 2


def test_an_older_study_without_a_token_gets_one_and_keeps_its_snapshots(person):
    person("ada")
    _, study, own, _ = begun()
    with sqlite3.connect(storage_url().removeprefix("sqlite:///")) as database:
        database.execute("DELETE FROM study_user_attributes WHERE key = 'token'")
    study = require_study("s", storage_url())
    kept = recovery.snapshot_folder(study, 0)
    kept.mkdir(parents=True)
    (kept / "00000004-abc.snapshot").touch()
    study = lifecycle.open_study(EXPERIMENT, "s", storage_url())
    assert [path.name for path in recovery.snapshot_folder(study, 0).iterdir()] == ["00000004-abc.snapshot"]
    assert lifecycle.study_id(study, storage_url()).token not in ("", own.token)


def test_runs_that_two_older_studies_share_are_taken_apart(person):
    """An earlier version put the runs of both under one parent."""
    person("ada")
    client, study, her_id, parent = begun()
    hers = run_trial(client, study, her_id, parent)
    person("bob")
    client, study, his_id, his_parent = begun()
    his = run_trial(client, study, his_id, his_parent)
    client.set_tag(his, tags.PARENT, parent)
    forget_tokens(client)
    client.delete_run(his_parent)
    _, his_id, his_parent = lifecycle.start(EXPERIMENT, "s", storage_url(), client, ExitStack())
    assert his_parent != parent and tracking.load_runs("s")["run_id"].to_list() == [his]
    person("ada")
    assert lifecycle.start(EXPERIMENT, "s", storage_url(), client, ExitStack())[1:] == (her_id, parent)
    assert tracking.load_runs("s")["run_id"].to_list() == [hers]


# --- one half of a study is gone -----------------------------------------------------------------------------


def test_a_study_database_that_was_removed_is_recognised_and_its_runs_set_aside(person):
    folder = person("ada")
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    shutil.copy(folder / "optuna.db", folder / "kept.db")
    (folder / "optuna.db").unlink()
    before = everything(client)
    with pytest.raises(UserError, match=r"does not have the study any more; .*study doctor s"):
        begun()
    assert everything(client) == before
    shown = examined(client, dry_run=True)
    assert [finding.mended for finding in shown] == [False] and everything(client) == before
    says = "tudy s: the tracking store has its runs, the study database does not have its trials; `python -m"
    (folder / "optuna.db").unlink()  # which the refused start has made
    all_studies, this_one = invoke("study", "status"), invoke("study", "status", "s")
    assert all_studies.returncode == 0 and all_studies.stdout.startswith(f"S{says}")
    assert this_one.returncode == 2 and this_one.stderr.startswith(f"Error: s{says}")
    assert all_studies.stdout.count("\n") == this_one.stderr.count("\n") == 1
    assert everything(client) == before and not (folder / "optuna.db").exists()
    (mended,) = examined(client)
    assert "tudy s:" not in invoke("study", "status").stdout
    aside = mended.what.rpartition(" ")[2]
    assert mended.mended and len(tracking.load_runs(aside)) == 1
    _, study, again, parent = begun()
    run_trial(client, study, again, parent)
    assert len(tracking.load_runs("s")) == 1 and len(tracking.load_runs(aside)) == 1
    (folder / "kept.db").replace(folder / "optuna.db")  # and it is found after all
    assert begun()[2] == own and len(tracking.load_runs("s")) == 1


def test_lost_checks_are_not_taken_for_their_study_and_json_leaves_lost_studies_to_standard_error(person):
    folder = person("ada")
    client, _, own, parent = begun()
    study_runs.open_study(client, replace(own, name="s-checks"), "")
    client.delete_run(parent)
    (folder / "optuna.db").unlink()
    asked = invoke("study", "status", "s")
    assert asked.returncode == 2 and asked.stderr.startswith("Error: study 's': "), asked.stderr
    assert invoke("study", "status", "s-checks").stderr.startswith("Error: study s-checks: the tracking store has its")
    listed = invoke("study", "status", "--json")
    assert listed.returncode == 0 and listed.stdout == "[]\n"
    assert listed.stderr.startswith("Study s-checks: the tracking store has its") and listed.stderr.count("\n") == 1


def test_an_older_copy_of_the_study_database_does_not_count_runs_twice(person):
    folder = person("ada")
    client, study, own, parent = begun()
    shutil.copy(folder / "optuna.db", folder / "older.db")
    run_trial(client, study, own, parent)
    (folder / "older.db").replace(folder / "optuna.db")
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    assert len(tracking.load_runs("s")) == 2
    (found,) = examined(client)
    assert "trial 0 has another run, or is gone" in found.what and found.mended
    assert len(tracking.load_runs("s")) == 1


def test_a_tracking_store_without_the_runs_is_recognised(person, workplace):
    person("ada")
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    client.delete_run(parent)
    with sqlite3.connect(workplace / "mlflow.db") as database:  # as another store
        database.execute("UPDATE tags SET value = '' WHERE key IN ('workbench.study', 'workbench.study_token')")
    with pytest.raises(UserError, match=r"does not have their runs; set MLFLOW_TRACKING_URI .*study doctor s"):
        begun()
    found = examined(client)
    assert [f.what for f in found] == [
        "s: the study has no run in the tracking store", "s: trial 0: its run is not in the tracking store",
    ]  # fmt: skip
    begun()


def test_a_dry_run_says_of_a_lost_tracking_store_what_the_repair_does(workplace, monkeypatch):
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    gone = workplace / "gone.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{gone}")
    looked = invoke("study", "doctor", "--dry-run")
    assert looked.returncode == 1 and not gone.exists()
    assert looked.stdout.splitlines() == [
        f"to mend           there is no tracking store {gone} (MLFLOW_TRACKING_URI says where runs lie); an empty one "
        "takes its place",
        "to mend           s: the study has no run in the tracking store",
        "cannot be mended  s: trial 0: its run is not in the tracking store",
        "3 findings.",
    ]
    mended = invoke("study", "doctor")
    assert mended.stdout == looked.stdout.replace("to mend", "mended ") and gone.exists()


def test_a_copy_of_a_study_database_does_not_write_into_its_originals_runs(person, workplace):
    folder = person("ada")
    begun()
    shutil.copytree(folder, workplace / "copy")
    person("copy")
    with pytest.raises(UserError, match=r"is a copy; its runs .* belong to .*ada/optuna\.db.*--study NAME"):
        begun()
    (folder / "optuna.db").unlink()  # then it was moved
    assert begun()[2].storage == storage_place()


# --- MLflow's trash ------------------------------------------------------------------------------------------


def test_a_deleted_experiment_names_how_to_restore_it(workplace):
    client = tracking.connect()
    number = tracking.store.experiment(client).experiment_id
    client.delete_experiment(number)
    for command in (["study", "doctor"], ["report"], ["sweep", "--trials", "1"]):
        refused = invoke(*command)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
        assert f"mlflow experiments restore --experiment-id {number}" in refused.stderr


def test_a_deleted_study_is_not_begun_again_beside_its_runs(person):
    person("ada")
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    client.delete_run(parent)
    before = everything(client)
    wanted = rf"was deleted; restore it: MLFLOW_TRACKING_URI=\S+ \S+ -m mlflow runs restore --run-id {parent}"
    with pytest.raises(Failure, match=wanted):
        begun()
    with pytest.raises(UserError, match=wanted):
        tracking.load_runs("s")
    (found,) = examined(client)
    assert found.mended is None and "restore it" in found.what and everything(client) == before
    client.restore_run(parent)
    assert begun()[3] == parent


def test_a_deleted_run_is_left_out_of_reports_and_named(person, caplog):
    person("ada")
    client, study, own, parent = begun()
    first, _ = run_trial(client, study, own, parent), run_trial(client, study, own, parent)
    client.delete_run(first)
    assert len(tracking.load_runs("s")) == 1
    assert "1 deleted runs are left out; to restore one: MLFLOW_TRACKING_URI=" in caplog.text
    begun()
    (found,) = examined(client)
    assert found.what.startswith("s: trial 0: its run was deleted; restore it: ") and first in found.what
    client.restore_run(first)
    assert len(tracking.load_runs("s")) == 2 and not examined(client, dry_run=True)
