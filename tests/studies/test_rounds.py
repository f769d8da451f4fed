"""Rounds of draw, score, pair and train on a tiny model: what they make, how they go on, what is said of mistakes."""

import json
import shutil

import polars as pl
import pytest

from tests.support.commands import invoke
from tests.support.helpers import overrides
from workbench import prefer, tracking
from workbench.evaluation import filling
from workbench.studies import rounds, single_run
from workbench.studies.rounds import Round
from workbench.tracking import store
from workbench.tracking.run_settings import settings_of
from workbench.training import run as training_run
from workbench.training.build import build
from workbench.training.config import resolve
from workbench.training.preparation import prepare
from workbench.training.tables import Rounds

QUICK = {
    "rounds.count": 2, "rounds.limit": 3, "rounds.images": 2, "rounds.steps": [2], "rounds.guidance": [1.5],
    "train.steps": 2, "train.lr": 1e-2, "train.batch_size": 2, "evaluation.grid": 0, "reference.policy": "frozen",
    "diagnostics.probe": 3,
}  # fmt: skip


@pytest.fixture
def settings(tiny, workplace):
    del tiny["data.train"], tiny["reference.interval"]
    return tiny | QUICK


def make(settings, *arguments, code=0, **changed):
    given = settings | {key.replace("_", ".", 1): value for key, value in changed.items()}
    done = invoke("rounds", *overrides(given), "--study", "r", *arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]


def runs():
    client = tracking.connect()
    return client.search_runs([store.experiment(client).experiment_id], order_by=["attributes.start_time ASC"])


def test_every_round_goes_on_from_the_one_before_and_is_measured_from_round_0(settings, workplace):
    text = make(settings)
    assert "Round 1 of 2" in text and "Round 2 of 2" in text
    parent, *children = runs()
    assert parent.info.run_name == "r" and [one.info.run_name for one in children] == ["r-round-1", "r-round-2"]
    assert {one.data.tags["mlflow.parentRunId"] for one in children} == {parent.info.run_id}
    first, second = map(settings_of, children)
    assert first["rounds.limit"] == "3" and first["model.policy"] == ""
    assert second["model.policy"] == second["model.reference"] == "rounds/r/1/model"
    pairs = [pl.read_parquet(f"rounds/r/{number}/pairs/train.parquet") for number in (1, 2)]
    assert [set(frame["model_0"]) for frame in pairs] == [{f"round {n}, 2 steps, guidance 1.5"} for n in (0, 1)]
    assert not set(pairs[0]["image_0_uid"]) & set(pairs[1]["image_0_uid"])
    # The second round's policy began where the first ended, and its divergence is that from the pretrained model.
    config = resolve({key: value for key, value in settings.items()} | {"data.train": "rounds/r/2/pairs"})
    begun = resolve(config.flat() | {"model.policy": "rounds/r/2/model"})
    prepared = prepare(config)
    training = build(begun, prepared.backend, prepared.train, prepared.probe)
    expected = training.probe(training.policy).error_difference
    assert children[1].data.metrics["divergence/policy"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "kind", [pytest.param({}, id="full"), pytest.param({"lora.rank": 2}, id="lora", marks=pytest.mark.slow)]
)
def test_unchanged_it_does_nothing_and_a_larger_count_adds_rounds(settings, workplace, monkeypatch, kind):
    make(settings | kind, rounds_count=1)
    before = {path: path.stat().st_mtime_ns for path in workplace.glob("rounds/**/*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "_make", None)
        assert "there is nothing to do. For more: raise rounds.count" in make(settings | kind, rounds_count=1)
    assert "Round 2 of 2" in make(settings | kind)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()) and len(runs()) == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the first test that needs them puts the rounds that nothing has interrupted, for all."""
    return tmp_path_factory.mktemp("rounds") / "whole"


#: The most rarely met moment is in every run: a round that is trained, and not kept yet.
@pytest.mark.parametrize("where", [pytest.param("draw", marks=pytest.mark.slow), "train", "keep"])
def test_an_interrupted_round_goes_on_and_ends_alike(settings, workplace, whole, monkeypatch, where):
    settings |= {"train.steps": 4, "snapshots.interval": 1}
    if not whole.exists():
        # Renamed once they are whole: a failure on the way must not pass for them in the next test.
        part = whole.with_name("part")
        shutil.rmtree(part, ignore_errors=True)
        make(settings, "--output", part)
        part.rename(whole)
        shutil.rmtree(workplace / ".workbench")
    with monkeypatch.context() as patch:
        if where == "draw":
            calls, real = [], filling.score
            patch.setattr(
                filling, "score", lambda *a, **k: calls.append(a) or (real(*a, **k) if len(calls) < 2 else stop())
            )
        elif where == "train":
            calls, real = [], training_run._Session.snapshot_if_due
            patch.setattr(
                training_run._Session,
                "snapshot_if_due",
                lambda self, step: real(self, step) or calls.append(step) or (stop() if len(calls) == 6 else None),
            )
        else:
            calls, real = [], rounds._keep
            patch.setattr(rounds, "_keep", lambda *a: calls.append(a) or (real(*a) if len(calls) < 2 else stop()))
        make(settings, code=130)
    assert (workplace / "rounds/r/1/round.json").exists() and not (workplace / "rounds/r/2/round.json").exists()
    text = make(settings)
    assert "Round 1 of 2" not in text and "Round 2 of 2" in text
    for name in ("1/model/unet", "2/model/unet"):
        (weights,) = (workplace / "rounds/r" / name).glob("*.safetensors")
        assert weights.read_bytes() == (whole / name / weights.name).read_bytes()
    assert not list(workplace.glob("rounds/**/*.partial"))


@pytest.mark.parametrize("later", ["train.ema", "rounds.tie"])
def test_rounds_of_an_earlier_version_lack_settings_that_came_later(settings, workplace, later):
    make(settings, rounds_count=1)
    record = workplace / "rounds/r/1/round.json"
    stored = json.loads(record.read_text())
    del stored[later]
    record.write_text(json.dumps(stored))
    assert "there is nothing to do" in make(settings, rounds_count=1)
    assert f"{later} = 0.5: round 1 of rounds/r was made with 0" in make(settings | {later: 0.5}, code=2)


def stop():
    raise KeyboardInterrupt


def test_policy_or_reference_may_begin_anew(settings):
    def begins(**changed):
        declared = resolve(settings | {f"rounds.{key}": value for key, value in changed.items()})
        model = Round(2, rounds.Path("f"), declared).config.model
        return model.path == settings["model.path"], model.policy, model.reference

    assert begins() == (True, "f/1/model", "f/1/model")
    assert begins(policy="pretrained") == (True, "", "f/1/model")
    assert begins(reference="pretrained") == (True, "f/1/model", "")


def test_mistakes_are_one_clear_line_and_nothing_is_lost(settings, workplace):
    assert "round 1: --scorer 'beauty': expected one of" in make(settings, code=2, rounds_scorers="beauty")
    assert "rounds.pairs = 'best'" in make(settings, code=2, rounds_pairs="best")
    assert "rounds.cuont: unknown setting (did you mean rounds.count?)" in make(settings, code=2, rounds_cuont=1)
    (workplace / "theirs").mkdir()
    (workplace / "theirs" / "thesis.txt").write_text("years of work")
    assert "--output theirs: has thesis.txt in it" in make(settings, "--output", "theirs", code=2)
    make(settings)
    said = make(settings, code=2, rounds_images=4)
    assert "rounds.images = 4: round 1 of rounds/r was made with 2 (1 differ); choose another --output" in said
    model, aside = workplace / "rounds/r/1/model", workplace / "aside"
    model.rename(aside)
    assert "round 1: its model rounds/r/1/model has vanished; bring it back" in make(settings, code=2)
    aside.rename(model)
    shutil.rmtree(workplace / "rounds/r/1")
    assert "rounds/r/1: this round is missing, and later ones were made from it" in make(settings, code=2)
    assert json.loads((workplace / "rounds/r/2/round.json").read_text())["rounds.images"] == 2


def test_the_rounds_choices_are_those_of_the_command():
    choices = {
        option.name: set(option.type.choices) for option in prefer.main.params if hasattr(option.type, "choices")
    }
    accepted = Rounds.model_json_schema()["properties"]
    for key in ("pairs", "label", "settings", "image_format"):
        assert set(accepted[key]["enum"]) == choices[key], key


def test_a_run_says_how_it_goes_on(settings, workplace, monkeypatch):
    monkeypatch.setattr(single_run, "execute", lambda *a, **k: stop())
    assert make(settings, code=130) == "Interrupted."
