"""Studies that are deleted, renamed, extended, and trials that are forgotten or repeated."""

from contextlib import ExitStack

import optuna
import pytest
from click.testing import CliRunner
from optuna.trial import TrialState

from workbench import study as command
from workbench import tracking
from workbench.common.errors import UserError
from workbench.common.paths import storage_url
from workbench.common.processes import this_process
from workbench.studies import alterations, lifecycle, records, recovery
from workbench.studies.attempt import Attempt
from workbench.studies.doctor import Doctor
from workbench.studies.experiment import Experiment
from workbench.studies.records import StudyRecord, TrialRecord
from workbench.studies.relocation import relocate
from workbench.studies.storage import names, open_storage
from workbench.studies.trials import counts, state_of
from workbench.studies.workers import remaining
from workbench.tracking import study_runs, tags
from workbench.training.snapshots import Snapshot, Snapshots

pytestmark = pytest.mark.filterwarnings("ignore")
SPACE = {"train.lr": {"type": "FloatDistribution", "low": 1e-5, "high": 1e-4}}
SETTINGS = {"sweep.trials": 3, "sweep.space": SPACE, "sweep.arms": {"one": {"train.lr": 2e-5}}}
EXPERIMENT = Experiment.resolve(SETTINGS)


def begun(name="s", experiment=EXPERIMENT):
    client = tracking.connect()
    return (client, *lifecycle.start(experiment, name, storage_url(), client, ExitStack()))


def run_trial(client, study, own, parent, value=0.5):
    """A trial and its run, with a snapshot, without training."""
    trial = study.ask({"train.lr": optuna.distributions.FloatDistribution(1e-5, 1e-4)})
    about = {tags.KIND: "trial", tags.STUDY: own.name, tags.TOKEN: own.token, tags.TRIAL: str(trial.number)}
    run = tracking.Tracker(client, f"trial-{trial.number}", params={}, tags=about, parent=parent)
    records.write(trial, process=this_process(), run_id=run.run_id)
    study.tell(trial, value)
    run.close("complete")
    folder = recovery.snapshot_folder(study, trial.number)
    folder.mkdir(parents=True)
    (folder / "snapshot").touch()
    return run.run_id


def stages(client):
    """Every run's name and whether it is in the trash."""
    number = tracking.store.experiment(client).experiment_id
    runs = client.search_runs([number], run_view_type=3)
    return {run.info.run_name: run.info.lifecycle_stage for run in runs}


def trials_of(name):
    return optuna.load_study(study_name=name, storage=open_storage(storage_url())).get_trials()


@pytest.fixture
def neighbours(workplace):
    """Somebody's own Optuna study in the same database, and another database's study of the same name."""
    optuna.create_study(study_name="theirs", storage=storage_url())
    client = tracking.connect()
    study_runs.open_study(client, study_runs.StudyId("s", "a" * 12, "elsewhere:/optuna.db"), "")
    client.set_terminated(study_runs.parents(client, "s")[0].info.run_id)
    return {run.info.run_id: (dict(run.data.tags), run.info) for run in study_runs.parents(client, "s")}


def unchanged(client, neighbours):
    for run_id, (before, info) in neighbours.items():
        run = client.get_run(run_id)
        assert run.data.tags == before and run.info.lifecycle_stage == info.lifecycle_stage
    assert "theirs" in optuna.get_all_study_names(storage_url())


def test_a_study_is_deleted_with_its_runs_and_snapshots_and_nothing_else(neighbours):
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    folder = recovery.snapshot_folder(study, 0).parent
    assert alterations.contents(client, "s", storage_url()) == (1, 2, 1)
    alterations.delete(client, "s", storage_url())
    assert optuna.get_all_study_names(storage_url()) == ["theirs"] and not folder.exists()
    assert client.get_run(parent).info.lifecycle_stage == "deleted" and stages(client)["trial-0"] == "deleted"
    unchanged(client, neighbours)
    with pytest.raises(UserError, match="'s': not found"):
        alterations.delete(client, "s", storage_url())
    with pytest.raises(UserError, match=r"'theirs' of .* was not made by the workbench"):
        alterations.delete(client, "theirs", storage_url())


def test_a_deletion_that_was_cut_short_is_done_again(workplace, monkeypatch):
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(alterations.optuna, "delete_study", killed)
        alterations.delete(client, "s", storage_url())
    alterations.delete(client, "s", storage_url())
    assert optuna.get_all_study_names(storage_url()) == [] and set(stages(client).values()) == {"deleted"}


def test_a_study_is_renamed_everywhere(neighbours):
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    begun("s-tuning")
    assert alterations.rename(client, "s", "t", storage_url()) == ["t", "t-tuning"]
    assert sorted(names(storage_url())) == ["t", "t-tuning"]
    client, renamed, identity, found = begun("t")
    assert (found, identity.token) == (parent, own.token) and recovery.snapshot_folder(renamed, 0).is_dir()
    (run,) = study_runs.children(client, client.get_run(parent))
    assert run.data.tags[tags.STUDY] == "t" and client.get_run(parent).info.run_name == "t"
    unchanged(client, neighbours)
    optuna.create_study(study_name="t-tuning-2", storage=storage_url())  # somebody's, of no study of the workbench
    assert alterations.rename(client, "t", "v", storage_url()) == ["v", "v-tuning"]
    assert "t-tuning-2" in optuna.get_all_study_names(storage_url())
    assert alterations.rename(client, "v", "t", storage_url()) == ["t", "t-tuning"]
    begun("u")
    for taken in ("u", "theirs"):
        with pytest.raises(UserError, match=f"study '{taken}': this study database has one already"):
            alterations.rename(client, "t", taken, storage_url())
    for kept in ("t-checks", "t-tuning", "t-tuning-2"):
        with pytest.raises(UserError, match=f"study '{kept}': is kept for the search and the checks of 't'"):
            alterations.rename(client, "t", kept, storage_url())
    with pytest.raises(UserError, match="study 's': the tracking store has one already"):
        alterations.rename(client, "t", "s", storage_url())


def test_a_renaming_that_was_cut_short_gives_no_third_name(workplace, monkeypatch):
    """The new name begins with the old one, and a kill comes when the tracking store has it already."""
    client, _, own, parent = begun()
    about = {tags.TOKEN: own.token, tags.KIND: "study"}
    number, ends = client.get_run(parent).info.experiment_id, ("-checks", "-aside-2020", "-checks-aside-2020")
    beside = [client.create_run(number, tags=about | {tags.STUDY: f"s{end}"}).info.run_id for end in ends]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(alterations.storage, "rename", killed)
        alterations.rename(client, "s", "s-2", storage_url())
    assert alterations.rename(client, "s", "s-2", storage_url()) == ["s-2"]
    renamed = [client.get_run(run).data.tags[tags.STUDY] for run in (parent, *beside)]
    assert renamed == ["s-2", *(f"s-2{end}" for end in ends)]


def test_snapshots_of_single_runs_follow_where_no_database_is(workplace):
    (workplace / "mlflow.db").unlink()
    run = Snapshots(workplace / ".workbench" / "runs" / "one")
    run.save(Snapshot(4, {}, settings={"data.prompts": "/old/prompts.txt"}))
    assert list(relocate("/old", "/new", storage_url())) == ["1 snapshots"]
    assert run.newest().settings == {"data.prompts": "/new/prompts.txt"}
    assert not [*workplace.glob("*.db")]


def test_snapshots_of_study_best_follow_the_study(workplace):
    client, _, own, _ = begun()
    token = own.token
    other = recovery.best_folder("s-tuned", token, 0)
    for folder in (recovery.best_folder("s", token, 0), recovery.best_folder("s", token, 12), other):
        Snapshots(folder).save(Snapshot(4, {}, settings={"data.prompts": "/old/prompts.txt"}))
        folder.with_name(f"{folder.name}.lock").touch()  # as `study best` leaves it
    assert list(relocate("/old", "/new", storage_url())) == ["2 snapshots"]
    assert alterations.rename(client, "s", "t", storage_url()) == ["t"]
    for number in (0, 12):
        kept = Snapshots(recovery.best_folder("t", token, number)).newest()
        assert kept.settings == {"data.prompts": "/new/prompts.txt"}
    assert alterations.contents(client, "t", storage_url()).snapshots == 2
    alterations.delete(client, "t", storage_url())
    assert [path for path in other.parent.iterdir() if path.is_dir()] == [other]


def test_a_forgotten_arm_is_run_again_and_a_forgotten_draw_is_not(workplace):
    client, study, own, parent = begun()
    runs = [run_trial(client, study, own, parent, value) for value in (0.1, 0.9, 0.5)]
    assert remaining(study, 3, running=False) == 0
    assert alterations.forget(client, "s", 0, storage_url()) == [0]
    assert alterations.forget(client, "s", 1, storage_url()) == [1]
    assert alterations.forget(client, "s", 1, storage_url()) == [1]  # once more changes nothing
    trials = trials_of("s")
    assert [state_of(t) for t in trials] == ["forgotten", "forgotten", "complete", "waiting"]
    assert [counts(t) for t in trials] == [False, False, True, False]
    again, first = TrialRecord.of(trials[3]), TrialRecord.of(trials[0])
    assert (again.arm, again.overrides, again.retry_of) == ("one", first.overrides, None)
    client, study, own, parent = begun()  # opens it anew
    assert study.best_value == 0.5 and remaining(study, 3, running=False) == 2
    assert [client.get_run(run).info.lifecycle_stage for run in runs] == ["deleted", "deleted", "active"]
    assert not recovery.snapshot_folder(study, 1).exists()
    found = [f.what for f in Doctor(client, storage_url(), True).examine("s") if "snapshots" not in f.what]
    assert [what for what in found if "nobody works" not in what] == []
    with pytest.raises(UserError, match="no trial 7; it has 4"):
        alterations.forget(client, "s", 7, storage_url())
    with pytest.raises(UserError, match="trial 3 has not ended"):
        alterations.forget(client, "s", 3, storage_url())


def test_a_forgotten_arm_is_run_again_whatever_copied_its_result(workplace):
    client, study, *_ = begun(experiment=extended(arms={"one": {"train.lr": 2e-5}, "two": {"train.lr": 3e-5}}))
    for _ in range(8):
        study.tell(study.ask(), 0.5)
    copy = study.ask()
    records.write(copy, copied_from=1)
    study.tell(copy, 0.5)
    # Python has 8 before 1 in a set of the two.
    assert alterations.forget(client, "s", 1, storage_url()) == [1, 8]
    *_, again = trials_of("s")
    assert (again.state, TrialRecord.of(again).arm) == (TrialState.WAITING, "two")


def test_of_two_arms_with_the_same_settings_each_is_run_again(workplace):
    client, study, *_ = begun(experiment=extended(arms={"one": {"train.lr": 2e-5}, "same": {"train.lr": 2e-5}}))
    for _ in range(2):
        study.tell(study.ask(), 0.5)
    assert alterations.forget(client, "s", 1, storage_url()) == [1]
    assert [TrialRecord.of(trial).arm for trial in trials_of("s")] == ["one", "same", "same"]


def test_nothing_is_changed_while_somebody_works_on_it(workplace):
    client, study, *_ = begun()
    records.write(study.ask(), process=this_process())
    for change in (
        lambda: alterations.delete(client, "s", storage_url()),
        lambda: alterations.rename(client, "s", "t", storage_url()),
        lambda: alterations.forget(client, "s", 0, storage_url()),
    ):
        with pytest.raises(UserError, match=r"study 's': process \d+ on .* runs trial 0; stop it first"):
            change()
    assert [t.state for t in trials_of("s")] == [TrialState.RUNNING]


def test_nothing_is_changed_while_a_command_prepares_or_is_between_two_trials(workplace, tmp_path):
    with ExitStack() as until_end:
        client = tracking.connect()
        lifecycle.start(EXPERIMENT, "s", storage_url(), client, until_end)
        for change in (
            lambda: alterations.delete(client, "s", storage_url()),
            lambda: alterations.rename(client, "s", "t", storage_url()),
            lambda: alterations.forget(client, "s", 0, storage_url()),
            lambda: begun(experiment=extended(arms={"two": {"train.lr": 3e-5}} | SETTINGS["sweep.arms"], trials=0)),
        ):
            with pytest.raises(UserError, match="study 's': another command works on it"):
                change()
        begun()  # any number of commands may work on a study
        begun("other")
        alterations.delete(client, "other", storage_url())
    assert names(storage_url()) == ["s"]
    with lifecycle.reading("s", storage_url()):
        done = CliRunner().invoke(command.main, ["delete", "s", "--yes"])
        assert done.exit_code == 2 and "another command works on it" in done.output, done.output
    alterations.delete(client, "s", storage_url())
    assert [path.name for path in tmp_path.rglob("*.lock")] == ["optuna.db.lock"]


def test_the_commands_ask_first(workplace):
    begun()
    for arguments in (["delete", "s"], ["rename", "s", "t"], ["forget", "s", "0"]):
        for answer in ("n\n", ""):
            done = CliRunner().invoke(command.main, arguments, input=answer)
            assert done.exit_code == 2 and "Error: nothing was changed; --yes answers" in done.output, done.output
    assert names(storage_url()) == ["s"]
    done = CliRunner().invoke(command.main, ["rename", "s", "t", "--yes"])
    assert done.exit_code == 0 and "Renamed: study t" in done.output, done.output
    done = CliRunner().invoke(command.main, ["delete", "t"], input="y\n")
    assert done.exit_code == 0 and "1 trials, 1 runs in MLflow" in done.output, done.output
    assert names(storage_url()) == []


# --- repeated settings and extensions ------------------------------------------------------------------------


def attempt(client, study, own, parent, experiment=EXPERIMENT):
    def train(_):
        raise AssertionError("it is trained")

    nothing = {"on_claimed": lambda: None, "on_step": lambda step: None, "stopping": lambda: False}
    return Attempt(study, experiment, client, own, parent, prepare=train, **nothing)


def test_settings_that_were_tried_are_not_trained_again(workplace):
    client, study, own, parent = begun()
    run_trial(client, study, own, parent, value=0.7)
    study.enqueue_trial({"train.lr": 2e-5})  # as a sampler may draw it: the arm's own value
    one = attempt(client, study, own, parent)
    study.optimize(one, n_trials=1)
    one.finish()
    copy = study.get_trials()[1]
    assert (copy.state, copy.value, TrialRecord.of(copy).copied_from) == (TrialState.COMPLETE, 0.7, 0)
    assert TrialRecord.of(copy).run_id is None and stages(client).keys() == {"s", "trial-0"}
    study.enqueue_trial({"train.lr": 3e-5})
    with pytest.raises(AssertionError, match="it is trained"):
        study.optimize(attempt(client, study, own, parent), n_trials=1)
    assert alterations.forget(client, "s", 0, storage_url()) == [0, 1]


def extended(**changed):
    return Experiment.resolve(SETTINGS | {f"sweep.{key}": value for key, value in changed.items()})


def test_arms_and_seeds_are_added_to_a_study(workplace, capsys):
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    more = extended(arms={"one": {"train.lr": 2e-5}, "two": {"train.lr": 3e-5}}, seeds=[0, 1], trials=0)
    client, study, again, found = begun(experiment=more)
    assert (found, again) == (parent, own)
    assert "Study s: arm two-s0 added." in capsys.readouterr().out
    names = [TrialRecord.of(trial).name for trial in study.get_trials()]
    assert names == ["one", "one-s1", "two-s0", "two-s1"]
    begun(experiment=more)  # once more adds nothing
    assert len(study.get_trials()) == 4
    with pytest.raises(UserError, match=r"was made with sweep\.arms = "):
        begun(experiment=EXPERIMENT)


def test_an_arm_with_another_arm_s_settings_is_added(workplace):
    begun()
    _, study, *_ = begun(experiment=extended(arms={"one": {"train.lr": 2e-5}, "same": {"train.lr": 2e-5}}))
    assert [TrialRecord.of(trial).arm for trial in study.get_trials()] == ["one", "same"]


def test_a_dimension_is_added_where_every_trial_lies_in_it(workplace):
    client, study, own, parent = begun()
    run_trial(client, study, own, parent)
    study.enqueue_trial({"train.lr": 3e-5})
    beta = {"type": "FloatDistribution", "low": 1000.0, "high": 1e5}
    with pytest.raises(UserError, match=r"trial 0 has objective\.beta = .*; widen sweep\.space\.objective\.beta"):
        begun(experiment=extended(space=SPACE | {"objective.beta": beta}))
    default = EXPERIMENT.config.flat()["objective.beta"]
    more = extended(space=SPACE | {"objective.beta": beta | {"low": default / 2}})
    client, study, *_ = begun(experiment=more)
    first, second = study.get_trials()
    assert first.params == {"train.lr": 2e-5, "objective.beta": default} and first.value == 0.5
    assert second.system_attrs["fixed_params"] == {"train.lr": 3e-5, "objective.beta": default}
    assert StudyRecord.of(study).definition == more.definition()
    assert more.trial_config(study.ask()).flat()["objective.beta"] == default
