"""A command whose standard streams break goes on all the same."""

import os
import subprocess
import sys

import pytest

from tests.support.helpers import ROOT

COMMAND = """
import os, sys, time
import click
from tqdm import tqdm
from workbench.common.command_line import command

def main():
    '''A run with a progress bar.'''
    bar = tqdm(total=3, mininterval=0)
    for step in range(3):
        bar.update(1)
        tqdm.write("written \\u2192")
        click.echo("told \\u2192")
        print("printed", step, flush=True)
    with open("database", "w", encoding="utf-8") as database:
        database.write(str(database.fileno()))

command(main)()
"""


@pytest.fixture
def shell(tmp_path):
    """Run a line of a shell in which $RUN is a command with a progress bar; its exit code is the command's."""
    (tmp_path / "run.py").write_text(COMMAND)

    def run(line, **environment):
        own = {"PYTHONPATH": str(ROOT), "RUN": f"{sys.executable} run.py"}
        script = ["bash", "-o", "pipefail", "-c", line]
        return subprocess.run(script, cwd=tmp_path, env=os.environ | own | environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("line", ["$RUN | true", "$RUN 2>&1 | true", "$RUN 2>/dev/full", "$RUN <&- >&- 2>&-"])
def test_what_cannot_be_shown_ends_nothing(line, shell, tmp_path):
    done = shell(line)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "database").read_text()) > 2  # which no library takes for a terminal


def test_output_that_somebody_wanted_and_that_is_lost_is_a_failure(shell, tmp_path):
    done = shell("$RUN > /dev/full")
    assert done.returncode == 1 and (tmp_path / "database").exists()
    assert done.stderr.endswith("Error: standard output: not all could be written (No space left on device)\n")


def test_letters_that_the_terminal_lacks_are_numbers(shell):
    done = shell("$RUN 2>/dev/null", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and "written \\u2192" in done.stdout and "told \\u2192" in done.stdout


def test_a_file_gets_each_line_of_both_streams_as_it_is_written(shell, tmp_path):
    (tmp_path / "run.py").write_text(
        "import sys, pathlib\nfrom workbench.common.streams import make_sturdy\nmake_sturdy()\n"
        "print('told')\nprint('bar', file=sys.stderr)\nprint('told again')\n"
        "print(repr(pathlib.Path('log').read_text()), file=sys.stderr)\n"
    )
    done = shell("$RUN > log 2>&1; cat log")
    assert done.stdout.splitlines() == ["told", "bar", "told again", repr("told\nbar\ntold again\n")]
