"""Progress in a log file, and on a terminal."""

import io
import multiprocessing

import pytest

from workbench.common.progress import Progress, drawn_by_worker


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds that tqdm and the bar see."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def stepped(stream, clock, monkeypatch, **options):
    """Forty steps of a second each, then as long in which nothing can be counted."""
    monkeypatch.setattr("sys.stderr", stream)
    bar = Progress(total=40, desc="study", unit="step", mininterval=10, maxinterval=10, **options)
    for _ in range(40):
        clock[0] += 1
        bar.update(1)
        bar.phase("training")
    for second in range(40):
        clock[0] += 1
        bar.phase(f"evaluating {second} %")
    bar.close()
    return stream.getvalue()


def test_a_log_gets_a_whole_line_about_every_ten_seconds_with_the_phase(clock, monkeypatch):
    text = stepped(io.StringIO(), clock, monkeypatch)
    lines = text.splitlines()
    assert "\r" not in text and text.endswith("\n") and all(line.strip() for line in lines)
    assert 8 <= len(lines) <= 12, text  # 80 seconds, the first and the last line
    assert "study: training:" in lines[1] and "/40 [" in lines[1]
    assert sum("evaluating" in line for line in lines) >= 3  # the clock moves while no step is taken


def test_a_bar_that_is_not_to_stay_leaves_no_blank_lines_in_a_log(clock, monkeypatch):
    text = stepped(io.StringIO(), clock, monkeypatch, leave=False)
    assert "\r" not in text and all(line.strip() for line in text.splitlines())


def test_a_terminal_keeps_one_line_and_shows_a_new_phase_at_once(clock, monkeypatch):
    text = stepped(Terminal(), clock, monkeypatch)
    assert text.count("\n") <= 1 and "\r" in text
    assert all(f"evaluating {second} %" in text for second in range(40))


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_worker_process_draws_none_over_that_of_its_command(stream, clock, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "the command")
    assert stepped(stream(), clock, monkeypatch, disable=False) == ""
    assert list(Progress(desc="verify", iterable=[1, 2])) == [1, 2]
    with drawn_by_worker():  # while the command has none
        assert "step" in stepped(stream(), clock, monkeypatch, disable=False)
