"""The fault campaign: studies are run while one thing after another goes wrong, then nothing may be lost.

A driver starts commands on a study, injects faults drawn at random from `faults.FAULTS`, and starts commands anew where
they ended. When the study is complete, or time is up, the same command once more and undisturbed has to bring it to its
end, and what Optuna, MLflow and the disk hold is checked (`invariants`). Then comes the next study, until time is up.
"""

import heapq
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the workbench and its tests

import click
import torch
from optuna.trial import TrialState

from tests.faults.faults import FAULTS, Injected
from tests.faults.invariants import KINDS, Ended, Found, Held, held, improper, violations
from tests.faults.material import Result, arms, make, undisturbed
from tests.faults.scene import NotNow, Scene
from tests.support.postgres import own_postgres
from workbench.benchmarks.tracking_server import TrackingServer
from workbench.common.command_line import quiet, silence_transformers
from workbench.common.markdown import markdown_table

DISK = "48m"
WAITING = 12.0  # seconds for which a fault that was drawn waits for something that it can hit
LATEST = 25.0  # seconds after which something goes wrong even where no trial runs


class Campaign:
    """One run of it, and its record.

    Args:
        asked: trials of a study; `steps` of a trial.
        commands: that work on a study at once.
        pause: mean seconds between faults.
    """

    def __init__(self, scene: Scene, arms: dict[str, Result], names: list[str], *, asked: int, steps: int,
                 commands: int, pause: float):  # fmt: skip
        self.scene, self.arms, self.names = scene, arms, names
        self.asked, self.steps, self.commands, self.pause = asked, steps, commands, pause
        self.began = time.monotonic()
        self.faults: list[dict] = []
        self.found: list[tuple[str, Found]] = []
        self.complaints = set[str]()
        self.trials = self.attempts = 0
        self._pending: list[tuple[float, int, str, Injected]] = []
        self._numbers = itertools.count()
        self._wanted, self._wanted_since = "", 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def study(self, name: str, seed: str, until: float) -> None:
        """Run one study under faults, then see whether everything is as it has to be."""
        scene = self.scene
        scene.study, scene.commands, scene.chance = name, [], random.Random(seed)
        self._disturb(until)
        if not scene.rest():
            self._report("wrong end", "commands did not end when they were asked to, or workers outlived them")
        last = scene.start()
        try:
            last.process.wait(300)
        except subprocess.TimeoutExpired:
            last.kill()
            self._report("wrong end", "the last, undisturbed command did not end")
        for command in scene.commands:
            ended = Ended(command.said_in.name, command.process.wait(), command.sent, command.said)
            self.found += [(name, found) for found in improper(ended)]
            self.complaints |= {line for line in ended.said.splitlines() if line.startswith("Error: ")}
        if last.process.returncode:
            self._report("wrong end", f"the last, undisturbed command: exit code {last.process.returncode}")
            return
        found = held(scene.url, name, scene.state, scene.place / "cache")
        expected = self._expected(found)
        self.found += [(name, each) for each in violations(found, self.asked, [*self.arms], expected, self.steps)]
        self.trials, self.attempts = self.trials + self.asked, self.attempts + len(found.trials)
        wrong = [each.kind for study, each in self.found if study == name]
        self._line(name, "checked", f"{len(found.trials)} attempts at {self.asked} trials; wrong: {wrong or 'nothing'}")

    def _expected(self, found: Held) -> dict[int, Result]:
        """What arms come to, and what the sampler's trials do that were tried more than once."""
        expected = {}
        for trial in found.trials:
            if "arm" in trial.user_attrs:
                expected[trial.number] = self.arms[trial.user_attrs["arm"]]
            elif "retry_of" in trial.user_attrs and trial.state == TrialState.COMPLETE:
                expected[trial.number] = undisturbed(self.scene.experiment, trial.params)
        return expected

    def _disturb(self, until: float) -> None:
        """Inject faults until the study is complete or time is up; then undo what is left to be undone."""
        scene = self.scene
        next_fault, latest = 0.0, self.seconds + LATEST
        while self.seconds < until and not any(c.process.poll() == 0 for c in scene.commands):
            while len(scene.live()) < self.commands:
                scene.start()
            while self._pending and self._pending[0][0] < self.seconds:
                self._undo(heapq.heappop(self._pending)[3])
            if self.seconds > next_fault and (self.seconds > latest or scene.trials()):
                injected = self._inject()
                next_fault = self.seconds + (scene.chance.uniform(0.3, 1.7) * self.pause if injected else 0.3)
                latest = self.seconds + LATEST
            time.sleep(0.5)
        while self._pending:
            self._undo(heapq.heappop(self._pending)[3])

    def _inject(self) -> bool:
        """One fault, none twice at once; False where there is nothing for it to hit yet."""
        busy = {FAULTS[kind].place or kind for _, _, kind, _ in self._pending}
        free = [name for name in self.names if (FAULTS[name].place or name) not in busy]
        if not free:
            return False
        if self._wanted not in free or self.seconds > self._wanted_since + WAITING:
            (self._wanted,) = self.scene.chance.choices(free, [FAULTS[name].weight for name in free])
            self._wanted_since = self.seconds
        kind, fault = self._wanted, FAULTS[self._wanted].inject(self.scene)
        try:
            text, seconds = next(fault)
        except NotNow:
            return False
        self._wanted = ""
        heapq.heappush(self._pending, (self.seconds + seconds, next(self._numbers), kind, fault))
        self.faults.append({"second": round(self.seconds, 1), "study": self.scene.study, "kind": kind, "what": text})
        self._line(self.scene.study, kind, text)
        return True

    def _undo(self, fault: Injected) -> None:
        for _ in fault:
            raise AssertionError("a fault yields once")

    def _report(self, kind: str, text: str) -> None:
        self.found.append((self.scene.study, Found(kind, text)))

    def _line(self, *parts: str) -> None:
        click.echo(f"{self.seconds:7.1f} s  {parts[0]:<9} {parts[1]:<20} {parts[2]}")

    def record(self) -> dict:
        """Everything, plain."""
        wrong = Counter(found.kind for _, found in self.found)
        return {
            "counts": {"faults": len(self.faults), "trials": self.trials, "attempts": self.attempts}
            | {kind: wrong[kind] for kind in KINDS}
            | {"seconds": round(self.seconds)},
            "kinds": dict(Counter(fault["kind"] for fault in self.faults).most_common()),
            "found": [{"study": study, "kind": found.kind, "what": found.text} for study, found in self.found],
            "complaints": sorted(self.complaints),
            "faults": self.faults,
        }


@contextmanager
def a_scene(place: Path, storage: str, workers: int, experiment: Path) -> Iterator[Scene]:
    """Stores of its own, and a small disk for the state folder where one can be mounted."""
    with ExitStack() as stack:
        scene = Scene(place, experiment, workers, f"sqlite:///{place / 'optuna.db'}")
        if storage == "postgres":
            scene.postgres = stack.enter_context(own_postgres())
            scene.url = scene.postgres.create()
            scene.server = stack.enter_context(TrackingServer(place, scene.postgres.create()))
        scene.state.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", scene.state]
        scene.small_disk = sys.platform == "linux" and not subprocess.run(mount, capture_output=True).returncode
        if scene.small_disk:
            stack.callback(subprocess.run, ["umount", "--lazy", scene.state])
        os.environ |= scene.environment()
        try:
            yield scene
        finally:
            for command in scene.commands:
                command.kill()


@click.command(context_settings={"show_default": True})
@click.option("--seconds", type=click.IntRange(10), default=600, help="For how long faults are injected.")
@click.option("--seed", type=int, help="What is drawn follows from it.  [default: the time]")
@click.option("--storage", type=click.Choice(["sqlite", "postgres"]), default="sqlite",
              help="Files, or a PostgreSQL of its own with a tracking server before it.")  # fmt: skip
@click.option("--commands", type=click.IntRange(1), default=2, help="Commands that work on a study at once.")
@click.option("--workers", type=click.IntRange(1), default=2, help="Workers of each.")
@click.option("--trials", type=click.IntRange(1), default=10, help="Trials of a study, its arms included.")
@click.option("--steps", type=click.IntRange(8), default=60, help="Steps of a trial.")
@click.option("--each", type=click.IntRange(1), default=240, help="Longest time for which one study is disturbed.")
@click.option("--pause", type=float, default=4.0, help="Mean seconds between two faults.")
@click.option("--faults", "chosen", metavar="NAME,NAME", default="", help="Only these.  [default: all]")
@click.option("--small", is_flag=True, help="Two arms instead of four.")
@click.option("--record", type=click.Path(path_type=Path), help="Write the record here, as JSON.")
@click.option("--keep", type=click.Path(path_type=Path), help="Work in this new folder and keep it.")
def main(seconds: int, seed: int | None, storage: str, commands: int, workers: int, trials: int, steps: int, each: int,
         pause: float, chosen: str, small: bool, record: Path | None, keep: Path | None) -> None:  # fmt: skip
    """Run studies while things go wrong, and see whether anything is lost, doubled, mismatched or of other bits.

    Prints a line a fault and a table at the end; the exit code is 1 if anything is not as it has to be. What is drawn
    follows from the seed; at which moment it hits does not, so that the same seed is the same plan, not the same film.

    \b
    Examples:
      python tests/faults/campaign.py --seconds 120
      python tests/faults/campaign.py --seconds 1500 --storage postgres --record campaign.json
      python tests/faults/campaign.py --seconds 300 --faults lose-worker,kill-worker --keep /tmp/campaign
    """
    names = [name.strip() for name in chosen.split(",")] if chosen else [*FAULTS]
    if set(names) - FAULTS.keys():
        raise click.BadParameter(f"there are: {', '.join(FAULTS)}", param_hint="--faults")
    seed, trials = int(time.time()) if seed is None else seed, max(trials, 2 if small else 4)
    record = record and record.resolve()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or disk and servers would stay
    quiet()
    silence_transformers()
    with ExitStack() as stack:
        if keep:
            if keep.exists():
                raise click.BadParameter(f"{keep} is there already", param_hint="--keep")
            keep.mkdir(parents=True)
        place = keep.resolve() if keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        os.chdir(place)
        stack.callback(os.chdir, "/")
        experiment = make(place, steps, trials, small=small)
        scene = stack.enter_context(a_scene(place, storage, workers, experiment))
        for name in [*names]:
            if why := FAULTS[name].impossible(scene):
                click.echo(f"left out: {name}: {why}")
                names.remove(name)
        click.echo(f"seed {seed}; first, undisturbed, each arm ...")
        results = arms(experiment)
        campaign = Campaign(scene, results, names, asked=trials, steps=steps, commands=commands, pause=pause)
        for number in itertools.count(1):
            campaign.study(f"study-{number}", f"{seed}/{number}", until=min(seconds, campaign.seconds + each))
            if campaign.seconds > seconds:
                break
        told = {"seed": seed, "storage": storage, "options": {"seconds": seconds, "commands": commands,
                "workers": workers, "trials": trials, "steps": steps, "pause": pause, "faults": names}}  # fmt: skip
        told |= campaign.record()
    if record:
        record.write_text(json.dumps(told, indent=1))
    click.echo("\n" + markdown_table(("fault", "times"), [*told["kinds"].items()]))
    click.echo("\n" + markdown_table([*told["counts"]], [[*told["counts"].values()]]))
    for found in told["found"]:
        click.echo(f"{found['kind']}: {found['study']}: {found['what']}")
    if told["found"] or not told["faults"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
