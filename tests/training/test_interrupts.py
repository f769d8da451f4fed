"""A KeyboardInterrupt may come at any line of a step, and the run still resumes to the same bits."""

import shutil
from pathlib import Path

import pytest

from tests.support.ended import Ended
from tests.support.interrupted import Interrupts, Tracer
from tests.support.runs import run
from workbench.training.config import resolve
from workbench.training.preparation import prepare
from workbench.training.snapshots import SUFFIX, Snapshots

#: The step that is interrupted: the reference moves in it, it is measured, a picture is drawn, a snapshot is taken.
STEP, STEPS = 4, 5
FOLDER = Path("snapshots")


class History(Ended):
    """What a run reports, with every value of a metric at a step: none may be reported twice."""

    def log(self, step, metrics):
        for name, value in metrics.items():
            self.metrics.setdefault((step, name), []).append(value)


@pytest.fixture
def changes(tiny, workplace):
    return tiny | {
        "train.steps": STEPS,
        "train.batch_size": 2,
        "train.accumulation": 2,
        "train.keep": True,
        "reference.rate": 0.5,
        "reference.delta": 1.0,
        "diagnostics.draws": 1,
        "diagnostics.probe": 4,
        "evaluation.seeds": 0,
        "evaluation.grid": 1,
        "evaluation.steps": 1,
        "snapshots.interval": 2,
    }


def interrupted_at_lines(changes, choose):
    """Interrupt a step at lines, and compare what the run ends in each time it was resumed with an undisturbed run.

    A resumed run has nothing but files to go on from. So it is run once for each set of snapshots that was left.

    Args:
        choose: from (file, number) of all lines of the step, in order, the numbers of those to be interrupted.
    Returns:
        How many lines were interrupted, and how many sets of snapshots were left.
    """
    prepared, expected, start = prepare(resolve(changes)), History(), Path("start")
    run(changes, expected, prepared)
    batches = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        stopping = lambda: next(batches) == (STEP - 1) * changes["train.accumulation"]  # noqa: E731
        run(changes, History(), prepared, snapshots=Snapshots(start), stopping=stopping)
    assert Snapshots(start).steps() == [STEP - 1]

    def resumed(tracer):
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(start, FOLDER)
        ended = History()

        def on_step(step, metrics):
            tracer.armed = step == STEP - 1

        run(changes, ended, prepared, snapshots=Snapshots(FOLDER, 2), on_step=on_step)
        assert ended == expected

    with Tracer() as tracer:
        resumed(tracer)
    chosen = choose(tracer.lines)
    interrupts = Interrupts(FOLDER, Path("interrupted").resolve(), chosen)
    interrupts.run(lambda: resumed(interrupts))
    left = {}
    for number in chosen:
        folder = interrupts.places / str(number) / FOLDER
        left.setdefault(frozenset(path.name for path in folder.glob(f"*{SUFFIX}")), []).append((number, folder))
    for names, folders in left.items():
        number, folder = folders[0]
        ended = History()
        run(changes, ended, prepared, snapshots=Snapshots(folder, 2))
        assert ended == expected, (sorted(names), interrupts.lines[number])
    return len(chosen), len(left)


def every_line(lines, often=1):
    """Numbers of each line's first and last run, or of every n-th line's, but of all that write a snapshot."""
    first, last = {}, {}
    for number, line in enumerate(lines):
        first.setdefault(line, number)
        last[line] = number
    kept = [line for place, line in enumerate(first) if place % often == 0 or "snapshots" in line[0]]
    return sorted({number for line in kept for number in (first[line], last[line])})


def test_an_interrupt_at_a_line_of_a_step_costs_the_step_alone(changes):
    changes["lora.rank"] = 2  # whose snapshots are small
    interrupted, left = interrupted_at_lines(changes, lambda lines: every_line(lines, often=16))
    assert interrupted > 40 and left == 2  # before the new snapshot, and after it


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora.rank": 2, "reference.rate": 1.0}], ids=["mixture", "lora copy"])
def test_an_interrupt_at_any_line_of_a_step_costs_the_step_alone(changes, more):
    interrupted, left = interrupted_at_lines(changes | more, every_line)
    assert interrupted > 500 and left == 2
