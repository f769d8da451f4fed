"""What a study's own page says, and where links and the command line take it from."""

from urllib.parse import unquote

from tests.support import searched
from tests.support.commands import invoke
from tests.support.studies import made
from workbench import tracking
from workbench.tracking import tags, ui
from workbench.tracking.overview import overview

LESS = {"sweep.objective": "divergence/policy", "sweep.direction": "minimize", "sweep.trials": 1}


def test_a_study_says_what_it_is_for_and_links_go_by_that(tiny, workplace, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/workbench/sweep.py", "my file.toml", "--set", "a=http://me:secret@host"])
    _, client, _ = made(tiny | LESS | {"sweep.constraints": {"divergence/policy": 0.5}})
    about = overview(client, "s")
    assert about.objectives == {"divergence/policy": "minimize"} and about.constraints == {"divergence/policy": 0.5}
    assert about.command == "python -m workbench.sweep 'my file.toml' --set a=http://***@host"
    link = unquote(tracking.ui_link(client, "s"))
    assert "orderByKey=metrics.`divergence/policy`&orderByAsc=true" in link
    # A study of an earlier version says nothing, and links go by the win rate as they did.
    client.delete_tag(about.run_id, tags.OBJECTIVE)
    link = unquote(tracking.ui_link(client, "s"))
    assert "orderByKey=metrics.`eval/win_rate`&orderByAsc=false" in link and overview(client, "s").objectives == {}


def test_going_on_does_not_rename_the_command_that_made_a_study(tiny, workplace, monkeypatch):
    for command in ("sweep", "study"):
        monkeypatch.setattr("sys.argv", [f"/x/workbench/{command}.py"])
        _, client, _ = made(tiny | LESS)
    assert overview(client, "s").command == "python -m workbench.sweep"


def test_a_single_run_has_its_command_its_version_and_a_link(workplace):
    client = tracking.connect()
    tracker = tracking.Tracker(client, "a", params={}, tags={"git.commit": "abc", tags.KIND: "run"})
    tracker.close("complete")
    about = client.get_run(tracker.run_id).data.tags
    assert about["mlflow.source.name"] and about["mlflow.source.git.commit"] == "abc"
    assert ui.run_link(client, tracker.run_id).endswith(f"/runs/{tracker.run_id}")


def test_status_names_the_metric_of_the_best_trial_and_its_interval(workplace):
    url = f"sqlite:///{workplace / 'optuna.db'}"
    ends = {"eval/win_rate_low": 0.5, "eval/win_rate_high": 0.75}
    wins = {"sweep.objective": "eval/win_rate", "sweep.direction": "maximize"}
    searched.study(wins, [searched.trial(0.25), searched.trial(0.625, **ends)], url, "s")
    done = invoke("study", "status", "s")
    assert "eval/win_rate 0.6250 (95 % interval over prompts: 0.500 to 0.750)" in done.stdout
    searched.study(searched.BOTH, [searched.trial(1.0, 0.1)], url, "t")
    assert ": eval/reward 1.0000, divergence/policy 0.1000\n" in invoke("study", "status", "t").stdout
