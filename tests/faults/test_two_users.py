"""Two users with studies of one name on one tracking server, under kills: neither touches what is the other's."""

import random
import time
from contextlib import suppress

import pytest

from tests.faults import faults
from tests.faults.invariants import Ended, held, improper, violations
from tests.faults.material import arms, make
from tests.faults.scene import NotNow, Scene
from workbench import tracking
from workbench.benchmarks.tracking_server import TrackingServer
from workbench.studies import lifecycle
from workbench.tracking import study_runs

KILLS = (faults.kill_worker, faults.kill_all, faults.kill_command, faults.ask_command, faults.ask_worker)
TRIALS, STEPS = 5, 40


def user(place, server):
    """A user's folder, with a study database, snapshots and a cache of its own."""
    place.mkdir()
    scene = Scene(place, make(place, STEPS, TRIALS, small=True), 1, f"sqlite:///{place / 'optuna.db'}", server)
    scene.study, scene.chance = "default", random.Random(str(place.name))
    scene.state.mkdir()
    return scene


def disturb(scenes, chance, until, most):
    """Keep a command of each user going, and kill now one's, now the other's; how often something was hit."""
    hit = 0
    while time.monotonic() < until and hit < most:
        for scene in scenes:
            if not scene.live():
                scene.start()
        with suppress(NotNow):
            for _ in chance.choice(KILLS)(chance.choice(scenes)):
                hit += 1
        time.sleep(chance.uniform(0.5, 2.0))
    return hit


def finished(scene):
    """The study's end, which the same command comes to once nobody disturbs it."""
    assert scene.rest()
    command = scene.start()
    assert command.process.wait(300) == 0, command.said
    return command.said


def runs_of(scene, monkeypatch):
    """All that the tracking store says of a user's runs."""
    monkeypatch.setenv("WORKBENCH_STORAGE", scene.url)
    client = tracking.connect()
    runs = study_runs.all_runs(client, lifecycle.identity(scene.study))
    return {run.info.run_id: (dict(run.info), run.data.to_dictionary()) for run in runs}


@pytest.mark.parametrize(
    ("seconds", "kills"),
    [pytest.param(90, 14, marks=pytest.mark.slow), pytest.param(900, 200, marks=pytest.mark.campaign)],
)
def test_nothing_of_one_user_is_touched_by_the_other(seconds, kills, tmp_path, monkeypatch):
    chance = random.Random(seconds)
    with TrackingServer(tmp_path) as server:
        ada, bob = users = [user(tmp_path / name, server) for name in ("ada", "bob")]
        try:
            for name, value in ada.environment().items():
                monkeypatch.setenv(name, value)
            monkeypatch.chdir(ada.place)
            expected = arms(ada.experiment)
            ada.start()  # so that the other's study is the second of its name
            while not ada.trials():
                assert ada.live(), ada.commands[0].said
                time.sleep(0.5)
            begun = time.monotonic()
            hit = disturb(users, chance, begun + seconds, kills)
            finished(ada)
            hers = runs_of(ada, monkeypatch)
            hit += disturb([bob], chance, begun + 1.5 * seconds, kills // 2)
            said = finished(bob)
            assert "the tracking store has another study called 'default'" in "".join(
                c.said for c in bob.commands + ada.commands
            ), said
            assert hit > kills // 4
            assert runs_of(ada, monkeypatch) == hers and hers.keys().isdisjoint(runs_of(bob, monkeypatch))
            for scene in users:
                monkeypatch.setenv("WORKBENCH_STORAGE", scene.url)
                found = held(scene.url, "default", scene.state, scene.place / "cache")
                results = {t.number: expected[t.user_attrs["arm"]] for t in found.trials if "arm" in t.user_attrs}
                assert not violations(found, TRIALS, [*expected], results, STEPS)
                for command in scene.commands:
                    ended = Ended(command.said_in.name, command.process.wait(), command.sent, command.said)
                    assert not improper(ended), ended.said
        finally:
            for scene in users:
                for command in scene.commands:
                    command.kill()
