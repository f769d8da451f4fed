"""Each invariant can fail: a store that was doctored is found out."""

import copy
import math
import signal
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from optuna.trial import FrozenTrial, TrialState

from tests.faults.invariants import COMPARED, FILES, KINDS, Ended, Held, Run, improper, violations
from tests.faults.material import Result
from workbench import tracking

STEPS, ASKED = 6, 3
ROWS = {step: dict.fromkeys(COMPARED, step / 8) for step in range(1, STEPS + 1)}
EXPECTED = {number: Result(ROWS, {"weights": f"of {arm}"}) for number, arm in {0: "one", 2: "", 3: "two"}.items()}


def trial(number: int, state: TrialState = TrialState.COMPLETE, **attributes) -> FrozenTrial:
    now = datetime(2026, 1, 1)
    ended, value = (now, 1.0) if state == TrialState.COMPLETE else (now, None)
    attributes |= {"run_id": f"r{number}"}
    return FrozenTrial(number, state, value, now, ended, {}, {}, attributes, {}, {}, number)


def run(number: int, status: str = "FINISHED", state: str = "complete", arm: str = "") -> Run:
    metrics = {name: [(step, row[name]) for step, row in ROWS.items()] for name in COMPARED}
    if state != "complete":
        return Run(f"r{number}", number, status, state, metrics)
    return Run(f"r{number}", number, status, state, metrics, FILES, tracking.history(ROWS), {"weights": f"of {arm}"})


@pytest.fixture
def sound() -> Held:
    """Two arms, the second of which was tried twice, and a trial of the sampler's."""
    return Held(
        [
            trial(0, arm="one"),
            trial(1, TrialState.FAIL, arm="two", snapshot=4),
            trial(2),
            trial(3, arm="two", retry_of=1),
        ],
        [run(0, arm="one"), run(1, "KILLED", "interrupted"), run(2), run(3, arm="two")],
        "FINISHED",
    )


def test_what_is_sound_is_found_sound(sound):
    assert violations(sound, ASKED, ["one", "two"], EXPECTED, STEPS) == []


def lose_a_trial(held):
    del held.trials[2], held.runs[2]


def lose_an_arm(held):
    del held.trials[3].user_attrs["arm"]


def forget_to_try_again(held):
    del held.trials[3].user_attrs["retry_of"]


def leave_one_running(held):
    held.trials.append(trial(4, TrialState.RUNNING))
    held.runs.append(run(4, "RUNNING", "running"))


def leave_one_waiting(held):
    held.trials.append(trial(4, TrialState.WAITING))
    del held.trials[4].user_attrs["run_id"]


def give_a_trial_up(held):
    held.trials[2] = trial(2, TrialState.FAIL, failed="not finite")
    held.runs[2] = run(2, "FAILED", "failed")


def run_one_too_many(held):
    held.trials.append(trial(4))
    held.runs.append(run(4))


def run_an_arm_twice(held):
    held.trials[2].user_attrs["arm"] = "one"


def try_again_twice(held):
    held.trials[2].user_attrs["retry_of"] = 1


def try_again_what_was_complete(held):
    held.trials[2].user_attrs["retry_of"] = 0


def track_a_trial_twice(held):
    held.runs.append(copy.copy(held.runs[0]))


def lose_a_run(held):
    del held.runs[1]


def leave_the_study_running(held):
    held.parent = "RUNNING"


def leave_a_run_running(held):
    held.runs[1].status = "RUNNING"


def finish_an_interrupted_run(held):
    held.runs[1].status, held.runs[1].state = "FINISHED", "complete"


def track_a_trial_that_is_not_there(held):
    held.runs.append(run(9, "FINISHED", "complete"))


def log_a_step_twice(held):
    held.runs[1].metrics["train/loss"].append((3, 0.375))


def lose_a_value(held):
    del held.runs[2].metrics["train/loss"][3]


def change_a_value(held):
    held.runs[2].metrics["train/loss"][3] = (4, math.pi)


def lose_a_file(held):
    held.runs[2].files = FILES - {"model"}


def lose_a_step(held):
    held.runs[2].history = held.runs[2].history.filter(pl.col("step") != 3)
    for values in held.runs[2].metrics.values():
        del values[2]


def end_in_another_number(held):
    held.runs[0].history = held.runs[0].history.with_columns(more=pl.lit(1e-9))


def end_in_other_weights(held):
    held.runs[3].weights = {"weights": "of one"}


def leave_a_snapshot(held):
    held.files = [Path("studies/s/00001/00000004-abc.snapshot")]


@pytest.mark.parametrize(
    ("doctor", "kind"),
    [
        (lose_a_trial, "lost"),
        (lose_an_arm, "lost"),
        (forget_to_try_again, "lost"),
        (leave_one_running, "lost"),
        (leave_one_waiting, "lost"),
        (give_a_trial_up, "lost"),
        (lose_a_run, "lost"),
        (lose_a_file, "lost"),
        (lose_a_step, "lost"),
        (run_one_too_many, "doubled"),
        (run_an_arm_twice, "doubled"),
        (try_again_twice, "doubled"),
        (try_again_what_was_complete, "doubled"),
        (track_a_trial_twice, "doubled"),
        (log_a_step_twice, "doubled"),
        (leave_the_study_running, "mismatched"),
        (leave_a_run_running, "mismatched"),
        (finish_an_interrupted_run, "mismatched"),
        (track_a_trial_that_is_not_there, "mismatched"),
        (lose_a_value, "mismatched"),
        (change_a_value, "mismatched"),
        (end_in_another_number, "wrong bits"),
        (end_in_other_weights, "wrong bits"),
        (leave_a_snapshot, "left over"),
    ],
)
def test_what_was_doctored_is_found_out(doctor, kind, sound):
    doctor(sound)
    assert kind in {found.kind for found in violations(sound, ASKED, ["one", "two"], EXPECTED, STEPS)}


@pytest.mark.parametrize(
    ("code", "sent", "said", "kinds"),
    [
        (0, set(), "8 trials in 30 s.", []),
        (1, set(), "Error: study storage cannot be opened", []),
        (130, {signal.SIGTERM}, "Interrupted.", []),
        (-2, {signal.SIGHUP}, "Interrupted.", []),
        (-2, set(), "Interrupted.", ["wrong end"]),
        (-9, {signal.SIGKILL}, "Traceback (most recent call last):", []),
        (0, set(), "Traceback (most recent call last):", ["traceback"]),
        (130, {signal.SIGINT}, "Exception ignored in: <Finalize>", ["traceback"]),
        (1, set(), "", ["wrong end"]),
        (2, set(), "Error: no such option", ["wrong end"]),
        (130, set(), "Interrupted.", ["wrong end"]),
        (-11, set(), "Fatal Python error: Segmentation fault", ["traceback", "wrong end"]),
    ],
)
def test_how_a_command_may_end(code, sent, said, kinds):
    assert [found.kind for found in improper(Ended("c", code, sent, said))] == kinds
    assert {*kinds} <= {*KINDS}
