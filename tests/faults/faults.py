"""What can go wrong: a function a fault.

Each is a generator. It does its harm and yields what it did and after how many seconds it is to be undone; what follows
the yield undoes it. It raises NotNow where there is nothing to hit.
"""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import psutil

from tests.faults.scene import NotNow, Scene, workers_of
from workbench.studies.storage import grace

Injected = Iterator[tuple[str, float]]


def kill_worker(scene: Scene) -> Injected:
    """A worker is gone without a word, as if memory ran out."""
    worker = scene.a_worker()
    worker.kill()
    yield f"worker {worker.pid}", 0


def kill_all(scene: Scene) -> Injected:
    """A command is gone with all its workers, as if the machine was switched off."""
    command = scene.a_command()
    command.kill()
    yield f"command {command.process.pid} and its workers", 0


def kill_command(scene: Scene) -> Injected:
    """A command is gone; its workers live on."""
    command = scene.a_command()
    command.send(signal.SIGKILL)
    yield f"command {command.process.pid}, with {len(workers_of([command]))} workers left", 0


def ask_command(scene: Scene) -> Injected:
    """A scheduler, a user or a closed terminal stops a command."""
    command, number = scene.a_command(), scene.chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    command.send(number)
    yield f"{number.name} to command {command.process.pid}", 0


def ask_command_twice(scene: Scene) -> Injected:
    """A user is impatient."""
    command = scene.a_command()
    command.send(signal.SIGINT)
    yield f"SIGINT twice to command {command.process.pid}", scene.chance.uniform(0.2, 3)
    command.send(signal.SIGINT)


def ask_worker(scene: Scene) -> Injected:
    """A worker is asked to stop, though not by its command."""
    worker = scene.a_worker()
    worker.terminate()
    yield f"SIGTERM to worker {worker.pid}", 0


def pause_worker(scene: Scene) -> Injected:
    """A worker stands still, but not for so long that it is taken for dead."""
    worker, seconds = scene.a_worker(), scene.chance.uniform(0.2, 0.7) * grace()
    worker.suspend()
    yield f"worker {worker.pid} for {seconds:.1f} s", seconds
    _resume(worker)


def lose_worker(scene: Scene) -> Injected:
    """A worker stands still until it was taken for dead, and goes on as if nothing had happened."""
    worker = scene.a_worker()
    seconds = _lose(scene, worker)
    yield f"worker {worker.pid} for {seconds:.1f} s", seconds
    _resume(worker)


def _lose(scene: Scene, worker: psutil.Process) -> float:
    worker.suspend()
    return scene.chance.uniform(1.5, 3) * grace()


def _kill(worker: psutil.Process) -> None:
    """And wait until it is, at most, a zombie: an orphan may stay one for long."""
    with suppress(psutil.Error):
        worker.kill()
        while worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


def _resume(worker: psutil.Process) -> None:
    with suppress(psutil.Error):
        worker.resume()


def pause_command(scene: Scene) -> Injected:
    """A command stands still; its workers do not."""
    command, seconds = scene.a_command(), scene.chance.uniform(1, 10)
    command.send(signal.SIGSTOP)
    yield f"command {command.process.pid} for {seconds:.1f} s", seconds
    command.send(signal.SIGCONT)


def damage_snapshot(scene: Scene) -> Injected:
    """The newest snapshot of a trial is damaged, and its worker is gone, or taken for dead."""
    number, worker = scene.a_trial()
    found = scene.snapshots(number)
    if not found:
        raise NotNow
    seconds = _lose(scene, worker) if scene.chance.random() < 0.6 else 0.0
    if not seconds:
        _kill(worker)
    newest = (scene.snapshots(number) or found)[-1]
    gone = f"stands still for {seconds:.1f} s" if seconds else "killed"
    yield f"trial {number}: {_damage(scene, newest)} {newest.name[:8]}; worker {worker.pid} {gone}", seconds
    _resume(worker)


def damage_all_snapshots(scene: Scene) -> Injected:
    """All snapshots of a study are damaged, and a worker is gone."""
    number, worker = scene.a_trial()
    _kill(worker)
    found = scene.snapshots()
    if not found:
        raise NotNow
    for path in found:
        _damage(scene, path)
    yield f"{len(found)} snapshots; worker {worker.pid} of trial {number} killed", 0


def _damage(scene: Scene, path: Path) -> str:
    kind = scene.chance.choice(["flipped", "cut", "emptied", "deleted"])
    with suppress(FileNotFoundError), path.open("r+b") as stream:  # a run that goes on removes what is old
        content = stream.read()
        place = scene.chance.randrange(len(content)) if content else 0
        if kind == "deleted":
            path.unlink()
        elif kind == "flipped":
            stream.seek(place)
            stream.write(bytes([content[place] ^ 0x40]) if content else b"")
        else:
            stream.truncate(place if kind == "cut" else 0)
    return kind


def leave_halves(scene: Scene) -> Injected:
    """A worker is gone while it writes: half a snapshot and half a line of what its run tells are left."""
    number, worker = scene.a_trial()
    found = scene.snapshots(number)
    journals = [path for path in scene.state.glob("outbox/*/journal.jsonl") if _has_open(worker, path)]
    if not found or not journals:
        raise NotNow
    _kill(worker)
    with suppress(FileNotFoundError):  # another worker was so quick that the trial is over
        content = found[-1].read_bytes()
        found[-1].with_name(f"9999.{uuid4().hex}.partial").write_bytes(content[: len(content) // 2])
        with journals[0].open("r+b") as stream:
            stream.seek(0, os.SEEK_END)
            stream.write(b'{"kind":"metrics","time":17')
    yield f"of worker {worker.pid} of trial {number}, killed", 0


def _has_open(process: psutil.Process, path: Path) -> bool:
    with suppress(psutil.Error):
        return any(Path(file.path) == path for file in process.open_files())
    return False


def fill_disk(scene: Scene) -> Injected:
    """The state folder's disk is full for a while."""
    path, seconds = scene.state / "filling", scene.chance.uniform(2, 8)
    with suppress(OSError), path.open("wb", buffering=0) as stream:
        while stream.write(bytes(2**16)):
            pass
    yield f"for {seconds:.1f} s, by {path.stat().st_size / 1e6:.1f} MB", seconds
    path.unlink()


def lock_study(scene: Scene) -> Injected:
    """Somebody else holds the study database."""
    yield from _lock(scene, "optuna.db")


def lock_tracking(scene: Scene) -> Injected:
    """Somebody else holds the tracking database."""
    yield from _lock(scene, "mlflow.db")


def _lock(scene: Scene, name: str) -> Injected:
    if not (scene.place / name).exists():
        raise NotNow
    connection = sqlite3.connect(scene.place / name, timeout=5, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        raise NotNow from None
    seconds = scene.chance.uniform(1, 8)
    yield f"{name} for {seconds:.1f} s", seconds
    connection.close()


def stop_tracking(scene: Scene) -> Injected:
    """The tracking server is gone and comes back."""
    assert scene.server is not None
    if not scene.server.answers():  # it is still about to come back
        raise NotNow
    seconds = scene.chance.uniform(1, 10)
    scene.server.stop()
    yield f"for {seconds:.1f} s", seconds
    scene.server.start(wait=False)


def stop_database(scene: Scene) -> Injected:
    """PostgreSQL, which has studies and tracking, throws everybody out at once and comes back."""
    assert scene.postgres is not None and scene.server is not None
    if not scene.server.answers():  # which could not start without it
        raise NotNow
    seconds = scene.chance.uniform(1, 12)
    os.kill(int((scene.postgres.folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
    scene.postgres.stop()
    yield f"for {seconds:.1f} s", seconds
    scene.postgres.start()


def _anywhere(scene: Scene) -> str:
    return ""


def _small_disk(scene: Scene) -> str:
    return "" if scene.small_disk else "a small file system cannot be mounted here (needs to be root)"


def _files(scene: Scene) -> str:
    return "the databases are no files here" if scene.postgres else ""


def _servers(scene: Scene) -> str:
    return "" if scene.postgres else "the databases are files here"


class Fault(NamedTuple):
    """What can be injected.

    Attributes:
        weight: how often, beside others.
        impossible: why it cannot be, in a scene; empty where it can.
        place: two faults of one place are not injected at once.
    """

    inject: Callable[[Scene], Injected]
    weight: int
    impossible: Callable[[Scene], str] = _anywhere
    place: str = ""


FAULTS = {
    "kill-worker": Fault(kill_worker, 3),
    "kill-all": Fault(kill_all, 1),
    "kill-command": Fault(kill_command, 1),
    "ask-command": Fault(ask_command, 1),
    "ask-command-twice": Fault(ask_command_twice, 1),
    "ask-worker": Fault(ask_worker, 2),
    "pause-worker": Fault(pause_worker, 4),
    "lose-worker": Fault(lose_worker, 6),
    "pause-command": Fault(pause_command, 2),
    "damage-snapshot": Fault(damage_snapshot, 5),
    "damage-all-snapshots": Fault(damage_all_snapshots, 1),
    "leave-halves": Fault(leave_halves, 2),
    "fill-disk": Fault(fill_disk, 1, _small_disk),
    "lock-study": Fault(lock_study, 1, _files),
    "lock-tracking": Fault(lock_tracking, 2, _files),
    "stop-tracking": Fault(stop_tracking, 1, _servers, "servers"),
    "stop-database": Fault(stop_database, 1, _servers, "servers"),
}
