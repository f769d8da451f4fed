import math

import pytest
import torch
from torch import nn

from workbench.method.reference import RULES, Divergence, Reference, Rule


def model(value: float) -> nn.Module:
    linear = nn.Linear(2, 1, bias=False)
    nn.init.constant_(linear.weight, value)
    return linear


def value(m: nn.Module) -> float:
    return m.weight.detach().flatten()[0].item()


def distance(m: nn.Module) -> Divergence:
    """A stand-in for the probe: how far the weight is from the pretrained 0."""
    return Divergence(value(m), abs(value(m)))


def reference(rule: Rule) -> Reference:
    return Reference(model(0.0), rule, distance, lambda: dict(model(0.0).named_parameters()))


def test_a_frozen_reference_never_moves():
    r = reference(RULES["frozen"]())
    assert all(r.after_step(step, model(1.0)) is None for step in range(1, 50))
    assert value(r.model) == 0 and r.frozen and r.updates == 0


def test_update_happens_at_multiples_of_the_interval_and_copies_exactly():
    r = reference(RULES["update"](interval=4))
    for step in range(1, 13):
        r.after_step(step, model(step / 10))
    assert [d.step for d in r.audit] == [4, 8, 12]
    assert value(r.model) == value(model(1.2)) and r.updates == 3
    assert r.divergence == distance(model(1.2))


def test_rate_below_one_mixes_and_rate_one_is_a_hard_copy():
    soft = reference(RULES["update"](interval=1, rate=0.25))
    soft.after_step(1, model(1.0))
    assert value(soft.model) == pytest.approx(0.25)
    soft.after_step(2, model(1.0))
    assert value(soft.model) == pytest.approx(0.4375)
    hard = reference(RULES["update"](interval=1, rate=1.0))
    hard.after_step(1, model(0.3))
    assert torch.equal(hard.model.weight, model(0.3).weight)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_candidate_beyond_delta_is_refused_and_freezes_for_good(rate):
    r = reference(RULES["threshold"](interval=1, delta=0.5, rate=rate))
    r.after_step(1, model(0.4))
    kept = r.model.weight.detach().clone()
    decision = r.after_step(2, model(2.0))
    assert decision is not None and decision.decision == "freeze" and decision.divergence > 0.5
    assert torch.equal(r.model.weight, kept) and r.divergence.error_difference <= 0.5
    assert r.after_step(3, model(0.1)) is None and r.updates == 1


def test_reinit_goes_back_to_the_pretrained_weights_and_on():
    r = reference(RULES["threshold"](interval=1, delta=0.5, on_exceed="reinit"))
    r.after_step(1, model(0.4))
    assert r.after_step(2, model(0.6)).decision == "reinit"
    assert value(r.model) == 0 and r.divergence == Divergence(0.0, 0.0) and not r.frozen
    assert r.after_step(3, model(0.2)).decision == "update"
    assert r.updates == 2


def test_exactly_delta_is_still_within():
    r = reference(RULES["threshold"](interval=1, delta=0.5))
    assert r.after_step(1, model(0.5)).decision == "update"


def test_the_reference_never_lies_beyond_delta_whatever_the_policy_does():
    g = torch.Generator().manual_seed(0)
    for rate in (1.0, 0.3):
        for on_exceed in ("freeze", "reinit"):
            r = reference(RULES["threshold"](interval=2, delta=0.5, rate=rate, on_exceed=on_exceed))
            for step in range(1, 60):
                r.after_step(step, model(torch.rand(1, generator=g).item() * 1.2))
                assert value(r.model) <= 0.5


def test_without_a_threshold_nothing_is_refused():
    assert RULES["update"]().delta == math.inf


def test_ema_moves_at_every_step_and_is_measured_now_and_then():
    measured = []
    r = reference(RULES["ema"](rate=0.25, measured=3))
    r.measure = lambda m: measured.append(value(m)) or distance(m)
    decisions = [r.after_step(step, model(1.0)) for step in range(1, 8)]
    assert [d.step for d in decisions if d] == [3, 6]
    assert value(r.model) == pytest.approx(1 - 0.75**7) and r.updates == 7
    assert measured == pytest.approx([1 - 0.75**3, 1 - 0.75**6]) and r.divergence == distance(model(measured[1]))


def test_ema_measured_at_every_step_is_an_update_with_its_rate_at_every_step():
    ema, update = reference(RULES["ema"](rate=0.1, measured=1)), reference(RULES["update"](interval=1, rate=0.1))
    for step in range(1, 9):
        assert ema.after_step(step, model(step / 4)) == update.after_step(step, model(step / 4))
    assert torch.equal(ema.model.weight, update.model.weight)


def test_an_ema_goes_on_from_its_state_as_if_it_had_not_stopped():
    whole, first = (reference(RULES["ema"](rate=0.1, measured=4)) for _ in range(2))
    for step in range(1, 6):
        whole.after_step(step, model(step)), first.after_step(step, model(step))
    second = reference(RULES["ema"](rate=0.1, measured=4))
    second.load(first.state())
    for step in range(6, 10):
        whole.after_step(step, model(step)), second.after_step(step, model(step))
    assert torch.equal(whole.model.weight, second.model.weight)
    assert whole.audit == second.audit and whole.updates == second.updates == 9


def test_a_candidate_beyond_what_the_probe_can_hardly_see_is_refused():
    r = reference(RULES["noise"](interval=1, sigmas=2.0))
    r.measure = lambda m: Divergence(value(m), abs(value(m)), 0.2)
    assert r.after_step(1, model(0.39)).decision == "update"
    assert r.after_step(2, model(0.41)).decision == "freeze"
    assert value(r.model) == value(model(0.39)) and r.frozen
    mixed = reference(RULES["noise"](interval=1, rate=0.5, sigmas=2.0))
    mixed.measure = r.measure
    assert mixed.after_step(1, model(2.0)).decision == "freeze" and value(mixed.model) == 0  # its way back was kept
