"""Runs whose policy or reference begins with trained weights; divergence is measured from the pretrained model."""

import pytest
import torch

from tests.support.runs import run
from workbench.common.errors import UserError
from workbench.training.build import build
from workbench.training.config import resolve
from workbench.training.experiment_file import read
from workbench.training.preparation import prepare

KINDS = {"full": {}, "lora": {"lora.rank": 2}}


@pytest.fixture
def quick(tiny, workplace):
    changes = {"evaluation.seeds": 0, "evaluation.grid": 0, "reference.policy": "frozen", "train.steps": 2}
    return {key: value for key, value in tiny.items() if key != "reference.interval"} | changes | {"train.lr": 1e-2}


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_begin_where_a_run_ended(quick, workplace, kind):
    settings = quick | KINDS[kind]
    prepared = prepare(resolve(settings))
    ended = run(settings, prepared=prepared, save_to=workplace / "first")
    moved = ended["divergence/policy"]
    assert moved != 0

    def begun(**places):
        config = resolve(settings | {f"model.{key}": str(place) for key, place in places.items()})
        training = build(config, prepared.backend, prepared.train, prepared.probe)
        return training, training.probe(training.policy).error_difference

    both, of_policy = begun(policy=workplace / "first", reference=workplace / "first")
    assert of_policy == pytest.approx(moved, rel=1e-4)
    assert both.reference.divergence.error_difference == pytest.approx(moved, rel=1e-4)
    record = next(both.records)
    assert record.step == 1 and float(record.values[0]) == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    alone, of_policy = begun(policy=workplace / "first")
    assert of_policy == pytest.approx(moved, rel=1e-4) and alone.reference.divergence.error_difference == 0
    assert float(next(alone.records).values[0]) != pytest.approx(0.6931, abs=1e-4)
    other, of_policy = begun(reference=workplace / "first")
    assert of_policy == 0 and other.reference.divergence.error_difference == pytest.approx(moved, rel=1e-4)


def test_a_reference_that_is_given_up_is_the_pretrained_model_again(quick, workplace):
    settings = quick
    run(settings, save_to=workplace / "first")
    settings |= {
        "model.reference": str(workplace / "first"),
        "reference.policy": "threshold",
        "reference.on_exceed": "reinit",
    }
    settings |= {"reference.interval": 1, "reference.delta": 1e-12}
    config = resolve(settings)
    prepared = prepare(config)
    training = build(config, prepared.backend, prepared.train, prepared.probe)
    next(training.records)
    assert training.reference.audit[0].decision == "reinit" and prepared.probe(training.reference.model)[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_there_or_do_not_fit_are_one_line(quick, workplace, kind):
    settings = quick | KINDS[kind]
    with pytest.raises(UserError, match=r"model\.policy = 'nowhere': no .* in it; expected a folder with"):
        prepare(resolve(settings | {"model.policy": "nowhere"}))
    if kind == "lora":
        run(settings | {"lora.rank": 3}, save_to=workplace / "first")
        with pytest.raises(UserError, match="of other layers or another rank"):
            run(settings | {"model.policy": str(workplace / "first")})


def test_they_are_found_beside_the_experiment_file(workplace):
    (workplace / "files" / "weights").mkdir(parents=True)
    (workplace / "files" / "a.toml").write_text('[model]\npolicy = "weights"\n')
    assert read(workplace / "files" / "a.toml")["model.policy"] == str(workplace / "files" / "weights")
