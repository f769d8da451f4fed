"""Where a campaign takes place: a folder with its stores, and the commands that work on a study there."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from tests.support.helpers import ROOT
from tests.support.postgres import Postgres
from workbench.benchmarks.tracking_server import TrackingServer

SLOW_TO_END = 150.0  # seconds within which whatever was asked to stop has to be gone
RUNNING = """
SELECT trials.number, attributes.value_json FROM trials
JOIN trial_user_attributes AS attributes ON attributes.trial_id = trials.trial_id
JOIN studies ON studies.study_id = trials.study_id
WHERE studies.study_name = :study AND trials.state = 'RUNNING' AND attributes.key = 'process'
"""


class NotNow(Exception):
    """There is nothing that a fault could hit."""


def processes_of(commands: Iterable["Command"]) -> Iterator[psutil.Process]:
    """What is left of commands and their workers, which may outlive them."""
    groups = {command.process.pid for command in commands}
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def workers_of(commands: Iterable["Command"]) -> list[psutil.Process]:
    """Those that live, of commands that do not, too."""
    found = []
    for process in processes_of(commands):
        with suppress(psutil.Error):
            if any("spawn_main" in part for part in process.cmdline()):
                found.append(process)
    return found


class Command:
    """A `python -m workbench.sweep` in a process group of its own; all that it and its workers say is in a file.

    Attributes:
        sent: the signals that it has been sent.
    """

    def __init__(self, arguments: list[str], said: Path, environment: dict[str, str]):
        self.said_in, self.began, self.sent = said, time.monotonic(), set[int]()
        with said.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workbench.sweep", *arguments],
                stdout=stream, stderr=stream, env=os.environ | environment, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not deaf, whoever started us
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        """A signal for the command alone."""
        self.sent.add(number)
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """The command with all its workers, at once."""
        self.sent.add(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        return self.said_in.read_text(errors="replace")


@dataclass
class Scene:
    """What faults act upon.

    Attributes:
        place: the working folder.
        url: the study database.
        server, postgres: what tracks and what stores, where they are processes of their own.
        small_disk: whether the state folder is a file system of its own, which can be filled.
        study: the one that is worked on now.
        commands: those that work on it, or did.
    """

    place: Path
    experiment: Path
    workers: int
    url: str
    server: TrackingServer | None = None
    postgres: Postgres | None = None
    small_disk: bool = False
    study: str = ""
    chance: random.Random = field(default_factory=random.Random)
    commands: list[Command] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.place / "state"

    @property
    def tracking_uri(self) -> str:
        return self.server.url if self.server else f"sqlite:///{self.place / 'mlflow.db'}"

    def environment(self) -> dict[str, str]:
        """Of the commands."""
        return {
            "PYTHONPATH": str(ROOT),
            "WORKBENCH_GRACE": "6",
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "WORKBENCH_STORAGE": self.url,
            "WORKBENCH_STATE": str(self.state),
            "WORKBENCH_CACHE": str(self.place / "cache"),
        }

    def start(self) -> Command:
        """One more command on the study."""
        folder = self.place / "said"
        folder.mkdir(exist_ok=True)
        arguments = [str(self.experiment), "--study", self.study, "--workers", str(self.workers)]
        command = Command(arguments, folder / f"{self.study}-{len(self.commands)}.txt", self.environment())
        self.commands.append(command)
        return command

    def live(self) -> list[Command]:
        return [command for command in self.commands if command.alive]

    def a_command(self) -> Command:
        """One that lives and has had the time to say how it takes signals; rather one whose workers have trials."""
        ready = [command for command in self.live() if time.monotonic() - command.began > 3]
        busy = {worker.pid for _, worker in self.trials()}
        return self._rather([c for c in ready if busy & {worker.pid for worker in workers_of([c])}], ready)

    def a_worker(self) -> psutil.Process:
        """One that lives, rather one that has a trial."""
        return self._rather([worker for _, worker in self.trials()], workers_of(self.commands))

    def a_trial(self) -> tuple[int, psutil.Process]:
        """One that is being run, and who runs it."""
        return self._one(self.trials())

    def trials(self) -> list[tuple[int, psutil.Process]]:
        """Those that are being run, by number, and who runs them."""
        alive = {worker.pid: worker for worker in workers_of(self.commands)}
        return [(number, alive[pid]) for number, pid in self._running().items() if pid in alive]

    def snapshots(self, number: int | None = None) -> list[Path]:
        """The study's, or a trial's, the newest last."""
        attempt = "*" if number is None else f"{number:05d}"
        return sorted(self.state.glob(f"studies/{self.study}-*/{attempt}/*.snapshot"), key=lambda path: path.name)

    def _running(self) -> dict[int, int]:
        """Trials that count as running, by number, and their processes; none while the database is away."""
        options = {"timeout": 1} if self.url.startswith("sqlite") else {"connect_timeout": 2}
        engine = create_engine(self.url, poolclass=NullPool, connect_args=options)
        try:
            with engine.connect() as connection:
                found = connection.execute(text(RUNNING), {"study": self.study}).all()
        except (SQLAlchemyError, sqlite3.Error):
            return {}
        return {number: int(json.loads(process).split("|")[1]) for number, process in found}

    def rest(self) -> bool:
        """Ask all commands to stop and wait until nothing of them is left; False if something had to be killed."""
        for command in self.live():
            command.send(signal.SIGTERM)
        if self.server and not self.server.answers():
            self.server.stop()
            self.server.start()
        deadline = time.monotonic() + SLOW_TO_END
        while any(True for _ in processes_of(self.commands)):
            if time.monotonic() > deadline:
                for command in self.commands:
                    command.kill()
                return False
            time.sleep(0.5)
        return True

    def _rather(self, busy: list, idle: list):
        """If nothing were left alone before it has begun, nothing would ever get anywhere."""
        return self._one(idle if self.chance.random() < 0.15 else busy)

    def _one(self, found: list):
        if not found:
            raise NotNow
        return self.chance.choice(found)
