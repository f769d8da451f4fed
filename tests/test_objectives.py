import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.objectives import OBJECTIVES, PairErrors, dpo, ipo, sft

ONE = torch.ones(1)


def errors(policy_w, policy_l, reference_w, reference_l) -> PairErrors:
    return PairErrors(
        *(torch.tensor([float(v)], dtype=torch.float64) for v in (policy_w, policy_l, reference_w, reference_l))
    )


def test_rewards_are_positive_where_the_policy_denoises_better():
    e = errors(0.3, 0.7, 0.5, 0.6)
    assert e.reward_w.item() == pytest.approx(0.2)
    assert e.reward_l.item() == pytest.approx(-0.1)
    assert e.margin.item() == pytest.approx(0.3)


def test_dpo_by_hand():
    # margin = (0.5 - 0.3) - (0.6 - 0.7) = 0.3; logit = 10 / 2 * 0.3 = 1.5; -log sigmoid(1.5) = log(1 + e^-1.5)
    assert dpo(errors(0.3, 0.7, 0.5, 0.6), ONE, beta=10).item() == pytest.approx(math.log1p(math.exp(-1.5)))


def test_dpo_with_lambda_by_hand():
    # lambda = 2 doubles the logit: 3.0
    assert dpo(errors(0.3, 0.7, 0.5, 0.6), 2 * ONE, beta=10).item() == pytest.approx(math.log1p(math.exp(-3.0)))


def test_ipo_by_hand():
    # (0.3 - 1 / (2 * 10))^2 = 0.25^2
    assert ipo(errors(0.3, 0.7, 0.5, 0.6), ONE, beta=10).item() == pytest.approx(0.0625)


def test_sft_is_the_winners_error():
    assert sft(errors(0.3, 0.7, 0.5, 0.6), ONE).item() == pytest.approx(0.3)


finite = st.floats(0, 2)


@given(finite, finite, st.floats(0.1, 10000), st.floats(0.1, 3))
def test_dpo_is_log_2_where_policy_and_reference_agree(winner, loser, beta, lam):
    assert dpo(errors(winner, loser, winner, loser), lam * ONE, beta=beta).item() == pytest.approx(math.log(2))


@given(finite, finite, finite, finite)
def test_swapping_winner_and_loser_negates_the_margin(a, b, c, d):
    assert errors(a, b, c, d).margin.item() == -errors(b, a, d, c).margin.item()


@given(finite, finite, finite, finite, st.floats(0.1, 100))
def test_dpo_of_a_pair_and_of_its_swap_are_the_two_sides_of_a_coin(a, b, c, d, beta):
    both = sum(math.exp(-dpo(e, ONE, beta=beta).item()) for e in (errors(a, b, c, d), errors(b, a, d, c)))
    assert both == pytest.approx(1)


def test_the_loss_of_a_batch_is_the_mean_of_log_sigmoids_not_the_log_sigmoid_of_a_mean():
    batch = PairErrors(*(torch.tensor(v) for v in ([0.1, 0.9], [0.9, 0.1], [0.5, 0.5], [0.5, 0.5])))
    each = dpo(batch, torch.ones(2), beta=10.0)
    assert each.shape == (2,)
    assert each.mean() > math.log(2) + 0.1  # margins cancel: the log-sigmoid of their mean would be log 2


def test_extreme_logits_stay_finite():
    for sign in (1, -1):
        e = errors(0, 0, sign * 1e6, -sign * 1e6)
        assert torch.isfinite(dpo(e, ONE, beta=5000.0)).all()


def test_dpo_gradient_raises_the_winner_and_lowers_the_loser():
    parts = [torch.tensor([0.5], requires_grad=i < 2) for i in range(4)]
    dpo(PairErrors(*parts), ONE, beta=10.0).sum().backward()
    assert parts[0].grad.item() == pytest.approx(2.5)  # beta / 2 * sigmoid(0)
    assert parts[1].grad.item() == pytest.approx(-2.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_returns_a_loss_per_pair_and_documents_itself(name):
    batch = PairErrors(*torch.rand(4, 5))
    assert OBJECTIVES[name](batch, torch.ones(5)).shape == (5,)
    assert inspect.getdoc(OBJECTIVES[name])
