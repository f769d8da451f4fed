"""Whatever kills a run, going on with it ends in the same bits."""

import functools
import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import runs
from tests.support.ended import Ended
from tests.support.killed import killed_run
from workbench.common.errors import Failure, UserError
from workbench.training.config import merge, resolve
from workbench.training.listener import Recorder
from workbench.training.preparation import Preparations
from workbench.training.snapshots import SUFFIX, Snapshot, Snapshots

STEPS, INTERVAL = 11, 3


@pytest.fixture
def long(tiny, workplace):
    """A run whose reference moves, is refused and starts anew, with an epoch's end inside."""
    return tiny | {
        "train.steps": STEPS,
        "train.accumulation": 2,
        "train.keep": True,
        "reference.on_exceed": "reinit",
        "reference.delta": 1e-4,
        "evaluation.grid": 2,
        "snapshots.interval": INTERVAL,
    }


#: What runs of the same model and data share, which none of them changes: it is made once for all tests.
PREPARATIONS = Preparations()


def run(changes, listener, **how):
    config = resolve(changes)
    return runs.run(config, listener, PREPARATIONS(config), **how)


@functools.cache
def _whole(changes):
    ended = Ended()
    run(json.loads(changes), ended)
    return ended


def whole(changes):
    """What a run that nothing ends leaves; the same for all tests that ask for the same run."""
    return _whole(json.dumps(changes, sort_keys=True))


def killed_after(step, snapshots, changes):
    """A part of a run that ends without a word after a step."""

    def on_step(now, news):
        if now == step:
            raise SystemExit("killed")

    with pytest.raises(SystemExit):
        run(changes, Ended(), snapshots=snapshots, on_step=on_step)


VARIANTS = [
    pytest.param({}, id="reinit"),
    pytest.param({"reference.rate": 0.5, "reference.on_exceed": "freeze", "reference.delta": 1.0}, id="mixture"),
    pytest.param({"lora.rank": 2, "train.lr": 1e-2}, id="lora", marks=pytest.mark.slow),
    pytest.param({"train.optimizer": "adafactor", "data.flip": True}, id="adafactor", marks=pytest.mark.slow),
    pytest.param(
        {"train.optimizer": "prodigy", "train.lr": 1.0},
        id="prodigy",
        marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("prodigyopt"), reason="needs prodigyopt")],
    ),
    pytest.param({"data.cache": False}, id="streamed", marks=pytest.mark.slow),
    pytest.param({"model.dtype": "float16"}, id="float16", marks=pytest.mark.slow),
    pytest.param({"objective.loss": "kto", "timesteps.density": "discounted"}, id="kto", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_run_killed_twice_ends_in_the_same_bits(changes, long):
    changes = merge(long, changes)
    expected = whole(changes)
    snapshots = Snapshots(Path("s"), INTERVAL)
    killed_after(7, snapshots, changes)  # goes on from 6
    killed_after(9, snapshots, changes)  # goes on from 9
    ended = Ended()
    run(changes, ended, snapshots=snapshots)
    assert ended == expected
    if not changes.get("lora.rank"):
        assert {"update", "reinit"} & set(expected.tables["reference_audit.json"]["decision"])


@pytest.mark.slow
def test_killed_after_any_step(long):
    expected = whole(long)
    for step in range(1, STEPS):
        snapshots, ended = Snapshots(Path(f"s{step}"), INTERVAL), Ended()
        killed_after(step, snapshots, long)
        assert snapshots.steps() == [s for s in range(step, 0, -1) if s % INTERVAL == 0][:2]
        run(long, ended, snapshots=snapshots)
        assert ended == expected, step


@pytest.mark.parametrize("batches", [1, 2, 9, 16])
def test_stopped_between_any_two_batches_it_goes_on_from_the_step_that_was_done(batches, long):
    expected, asked = whole(long), iter(range(1000))
    snapshots = Snapshots(Path("s"))
    with pytest.raises(KeyboardInterrupt):
        run(long, Ended(), snapshots=snapshots, stopping=lambda: next(asked) == batches)
    assert snapshots.steps() == ([batches // 2] if batches > 1 else [])
    ended = Ended()
    run(long, ended, snapshots=snapshots)
    assert ended == expected


def test_a_damaged_snapshot_is_passed_over(long, caplog):
    expected, snapshots = whole(long), Snapshots(Path("s"), INTERVAL)
    killed_after(7, snapshots, long)
    newest = max(snapshots.folder.glob(f"*{SUFFIX}"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    ended = Ended()
    run(long, ended, snapshots=snapshots)
    assert ended == expected and "going back to the one before" in caplog.text


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_goes_unnoticed(data, tmp_path):
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    snapshots = Snapshots(tmp_path / "s")
    for step in (1, 2):
        state = {"weights": torch.full((50,), float(step))}
        snapshots.save(Snapshot(step, state, [("log", step, {"a": float("nan")})]))
    newest = max(snapshots.folder.iterdir())
    content = newest.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "append", "swap"]))
    if kind == "cut":
        newest.write_bytes(content[:place])
    elif kind == "flip":
        flipped = bytes([content[place] ^ data.draw(st.integers(1, 255))])
        newest.write_bytes(content[:place] + flipped + content[place + 1 :])
    elif kind == "append":
        newest.write_bytes(content + data.draw(st.binary(min_size=1, max_size=9)))
    else:
        newest.write_bytes(min(snapshots.folder.iterdir()).read_bytes())
    found = snapshots.newest()
    assert found.step == 1 and (found.state["weights"] == 1).all()


def test_discarding_leaves_what_somebody_else_put_there(tmp_path):
    ours, shared = Snapshots(tmp_path / "ours"), Snapshots(tmp_path / "shared", before=[tmp_path / "ours"])
    for snapshots in (ours, shared):
        snapshots.save(Snapshot(1, {"weights": torch.zeros(2)}))
    for name in ("notes.txt", "film.mkv.partial"):
        (tmp_path / "shared" / name).write_text("years of work")
    shared.discard()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["film.mkv.partial", "notes.txt", "shared"]


def test_a_pickle_under_a_snapshots_name_is_not_run(tmp_path):
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    for content in (pickle.dumps(Evil()), _saved(Evil(), tmp_path)):
        folder = tmp_path / "s"
        folder.mkdir(exist_ok=True)
        (folder / f"00000001-{hashlib.sha256(content).hexdigest()[:32]}{SUFFIX}").write_bytes(content)
        assert Snapshots(folder).newest() is None
    assert not (tmp_path / "canary").exists()


def _saved(thing, folder):
    torch.save({"a": thing}, folder / "evil.pt")
    return (folder / "evil.pt").read_bytes()


def test_other_settings_or_data_are_refused(long, tiny_pairs, tmp_path):
    snapshots = Snapshots(Path("s"), INTERVAL)
    killed_after(4, snapshots, long)
    with pytest.raises(UserError, match=r"train.lr = 0.5: the snapshot of .* was made with 0.001"):
        run(long | {"train.lr": 0.5}, Ended(), snapshots=snapshots)
    run(long | {"snapshots.interval": 5}, Ended(), snapshots=snapshots)  # no matter


def test_a_snapshot_made_before_a_setting_was_there_goes_on(long):
    snapshots = Snapshots(Path("s"), INTERVAL)
    killed_after(4, snapshots, long)
    old = snapshots.newest()
    older = {name: value for name, value in old.settings.items() if name not in ("objective.safeguard", "objective.mu")}
    assert len(older) == len(old.settings) - 2
    snapshots.save(old._replace(settings=older))
    with pytest.raises(UserError, match=r"objective.mu = 0.5: the snapshot of .* was made with 0.0"):
        run(long | {"objective.mu": 0.5}, Ended(), snapshots=snapshots)
    resumed = Ended()
    run(long, resumed, snapshots=snapshots)
    assert min(resumed.metrics) == 1  # replayed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs to be root)")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_snapshot(small_disk, long):
    size = 2**20 // 4
    snapshots = Snapshots(small_disk / "s")
    snapshots.save(Snapshot(1, {"weights": torch.zeros(size)}))
    with pytest.raises(Failure, match=r"snapshot of step 2 cannot be written \(.*No space left.*that of step 1 is"):
        snapshots.save(Snapshot(2, {"weights": torch.ones(size)}))
    assert snapshots.newest().step == 1 and len(list((small_disk / "s").iterdir())) == 1


def test_a_process_killed_outright(long, workplace):
    """Not only the loop: nothing of the process is left, and the rest is done by another one, on pairs of the cache."""
    expected = whole(long)
    killed_run(long, Snapshots(Path("s"), INTERVAL), 8)
    ended = Ended()
    runs.run(long, ended, snapshots=Snapshots(Path("s"), INTERVAL))
    assert ended == expected


def test_what_was_reported_can_be_reported_again():
    first, second = Ended(), Ended()
    recorder = Recorder(first)
    recorder.log(1, {"a": 1.0})
    recorder.log(2, {"a": 2.0})
    again = Recorder(second)
    again.replay(recorder.events)
    assert first == second and again.last == {"a": 2.0}
