"""Signals: those that are ignored stay so, and those that come too early wait."""

import os
import signal

import pytest

from tests.support.commands import signal_handlers_kept
from workbench.common.command_line import command
from workbench.common.signals import held, stop_on_signals


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def handlers():
    with signal_handlers_kept():
        yield


def test_a_hang_up_that_nohup_lets_be_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    seen = []

    def main():
        """A run."""
        with stop_on_signals("SIGINT", "SIGTERM", "SIGHUP") as stopping:
            send("SIGHUP")
            seen.append(stopping())

    command(main).main([], standalone_mode=False)
    assert seen == [False] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_an_interrupt_waits_for_what_must_not_be_cut_short():
    signal.signal(signal.SIGINT, interrupt)
    done = []
    with pytest.raises(KeyboardInterrupt), held("SIGINT"):
        send("SIGINT")
        done.append("all of it")
    assert done and signal.getsignal(signal.SIGINT) is interrupt


def test_a_second_interrupt_does_not_wait():
    signal.signal(signal.SIGINT, interrupt)
    done = []
    with pytest.raises(KeyboardInterrupt), held("SIGINT"):
        send("SIGINT")
        send("SIGINT")
        done.append("all of it")
    assert not done and signal.getsignal(signal.SIGINT) is interrupt


def test_nothing_waits_where_nothing_came():
    with held("SIGINT", "SIGTERM"):
        pass
