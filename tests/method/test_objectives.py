import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.method.objectives import OBJECTIVES, PairErrors, dmpo, dpo, dspo, ipo, kto, linear, mapo, sft

ONE = torch.ones(1, dtype=torch.float64)


def errors(policy_w, policy_l, reference_w, reference_l, distance_w=0.0, residuals=0.0) -> PairErrors:
    values = (policy_w, policy_l, reference_w, reference_l, distance_w, residuals)
    return PairErrors(*(torch.tensor([float(v)], dtype=torch.float64) for v in values))


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


def test_linear_by_hand():
    # -10 / 2 * 2 * 0.3
    assert linear(errors(0.3, 0.7, 0.5, 0.6), 2 * ONE, beta=10).item() == pytest.approx(-3.0)


def test_linear_has_twice_the_slope_of_dpo_where_policy_and_reference_agree():
    slopes = []
    for loss in (dpo, linear):
        parts = [torch.tensor([0.5], requires_grad=i == 0) for i in range(6)]
        loss(PairErrors(*parts), torch.ones(1), beta=10.0).sum().backward()
        slopes.append(parts[0].grad.item())
    assert slopes == pytest.approx([2.5, 5.0])


def test_kto_by_hand():
    # g_w = 0.2, g_l = -0.1, z = max(mean, 0) = 0.05; beta = 10:
    # 1 - sigmoid(10 * 0.15) and 1 - sigmoid(-10 * -0.15), both 1 / (1 + e^1.5)
    assert kto(errors(0.3, 0.7, 0.5, 0.6), ONE, beta=10).item() == pytest.approx(1 / (1 + math.exp(1.5)))


def test_kto_takes_no_negative_baseline():
    # g_w = -0.2, g_l = -0.4, mean -0.3, z = 0: winner 1 - sigmoid(-2), loser 1 - sigmoid(4)
    by_hand = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(4))) / 2
    assert kto(errors(0.7, 0.9, 0.5, 0.5), ONE, beta=10).item() == pytest.approx(by_hand)


def test_kto_lets_no_gradient_through_its_baseline():
    values = (0.3, 0.7, 0.5, 0.6, 0, 0)
    parts = [torch.tensor([v], dtype=torch.float64, requires_grad=i < 2) for i, v in enumerate(values)]
    kto(PairErrors(*parts), ONE, beta=10.0).sum().backward()
    slope = 0.5 * 10 * (s := 1 / (1 + math.exp(1.5))) * (1 - s)  # with z fixed, each side's own sigmoid alone
    assert [p.grad.item() for p in parts[:2]] == pytest.approx([slope, -slope])


def test_dspo_by_hand():
    # one element: eps = 1, policy 0.5, reference 0.2: m_w = 0.25, r_w = 0.64, d_w = 0.09; the loser moves nowhere.
    # margin = 0.39; logit = 2 / 2 * 0.39; k = 2 (1 - sigmoid(0.39)); loss = (0.5 - 1 - k (0.5 - 0.2))^2
    k = 2 * (1 - 1 / (1 + math.exp(-0.39)))
    assert dspo(errors(0.25, 0.1, 0.64, 0.1, 0.09), ONE, beta=2).item() == pytest.approx((-0.5 - 0.3 * k) ** 2)


@given(st.lists(st.floats(-2, 2), min_size=9, max_size=9), st.floats(0.01, 3), st.floats(0.5, 2))
def test_dspo_is_its_definition_on_predictions(values, beta, lam):
    eps, policy, reference = torch.tensor(values, dtype=torch.float64).view(3, 1, 3)
    mean = lambda x: x.square().mean(1)  # noqa: E731
    margin = mean(reference - eps) - mean(policy - eps)
    k = beta * lam * (1 - torch.sigmoid(beta / 2 * lam * margin))
    zero = torch.zeros(1, dtype=torch.float64)
    batch = PairErrors(mean(policy - eps), zero, mean(reference - eps), zero, mean(policy - reference), zero)
    expected = mean(policy - eps - k[:, None] * (policy - reference))
    assert dspo(batch, lam * ONE, beta=beta).item() == pytest.approx(expected.item(), abs=1e-9)


def test_dspo_with_a_tiny_beta_is_sft():
    e = errors(0.3, 0.7, 0.5, 0.6, 0.1)
    assert dspo(e, ONE, beta=1e-9).item() == pytest.approx(sft(e, ONE).item())


def test_dspo_is_the_winners_error_where_policy_and_reference_agree():
    assert dspo(errors(0.3, 0.7, 0.3, 0.7), ONE, beta=0.5).item() == pytest.approx(0.3)


def test_dmpo_by_hand():
    # logit 1.5, p = 1 / (1 + e^-1.5), q = 0.9
    p = 1 / (1 + math.exp(-1.5))
    by_hand = p * math.log(p / 0.9) + (1 - p) * math.log((1 - p) / 0.1)
    assert dmpo(errors(0.3, 0.7, 0.5, 0.6), ONE, beta=10, alpha=0.1).item() == pytest.approx(by_hand)


def test_dmpo_is_least_where_the_preference_is_as_sure_as_the_labels():
    # logit = 10 / 2 * margin = log(0.9 / 0.1)
    margin = math.log(9) / 5
    losses = [dmpo(errors(0.5 - m, 0.5, 0.5, 0.5), ONE, beta=10, alpha=0.1).item() for m in (0.9 * margin, margin, 0.5)]
    assert losses[1] == pytest.approx(0, abs=1e-12) and losses[0] > 0 < losses[2]


def test_dmpo_of_a_swapped_pair_expects_the_opposite_label():
    # KL(p || q) of a pair is KL(1 - p || 1 - q) of its swap
    pair, swap = errors(0.3, 0.7, 0.5, 0.6), errors(0.7, 0.3, 0.6, 0.5)
    a, b = dmpo(pair, ONE, beta=10, alpha=0.1), dmpo(swap, ONE, beta=10, alpha=0.9)
    assert a.item() == pytest.approx(b.item())


def test_dmpo_where_policy_and_reference_agree():
    found = dmpo(errors(0.3, 0.7, 0.3, 0.7), ONE, alpha=0.1).item()
    assert found == pytest.approx(-math.log(4 * 0.1 * 0.9) / 2)


def test_mapo_by_hand():
    # s = 0.5: h(0.2) = 0.1 / (e^0.1 - 1), h(0.6) = 0.3 / (e^0.3 - 1)
    h_w, h_l = 0.1 / (math.exp(0.1) - 1), 0.3 / (math.exp(0.3) - 1)
    by_hand = 0.2 + 0.3 * math.log1p(math.exp(-10 * (h_w - h_l)))
    assert mapo(errors(0.2, 0.6, 9, 9), ONE, beta=0.3, factor=10).item() == pytest.approx(by_hand)


def test_mapo_needs_no_reference():
    assert mapo(errors(0.2, 0.6, 9, 9), ONE).item() == mapo(errors(0.2, 0.6, 0, 1), ONE).item()


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
    batch = PairErrors(*(torch.tensor(v) for v in ([0.1, 0.9], [0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0])))
    each = dpo(batch, torch.ones(2), beta=10.0)
    assert each.shape == (2,)
    assert each.mean() > math.log(2) + 0.1  # margins cancel: the log-sigmoid of their mean would be log 2


def test_extreme_logits_stay_finite():
    for sign in (1, -1):
        e = errors(0, 0, sign * 1e6, -sign * 1e6)
        assert torch.isfinite(dpo(e, ONE, beta=5000.0)).all()
        assert torch.isfinite(dmpo(e, ONE, beta=5000.0)).all()


def test_dpo_gradient_raises_the_winner_and_lowers_the_loser():
    parts = [torch.tensor([0.5], requires_grad=i < 2) for i in range(6)]
    dpo(PairErrors(*parts), ONE, beta=10.0).sum().backward()
    assert parts[0].grad.item() == pytest.approx(2.5)  # beta / 2 * sigmoid(0)
    assert parts[1].grad.item() == pytest.approx(-2.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_returns_a_loss_per_pair_and_documents_itself(name):
    batch = PairErrors(*torch.rand(6, 5))
    assert OBJECTIVES[name](batch, torch.ones(5)).shape == (5,)
    assert inspect.getdoc(OBJECTIVES[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_starts_by_lowering_the_winners_error(name):
    parts = [torch.full((2,), v, requires_grad=i < 2) for i, v in enumerate((0.5, 0.6, 0.5, 0.6, 0.0, 0.0))]
    OBJECTIVES[name](PairErrors(*parts), torch.ones(2)).mean().backward()
    assert (parts[0].grad > 0).all()


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"sft"}))
def test_lambda_matters_to_every_preference_objective(name):
    batch = PairErrors(*(torch.tensor([v]) for v in (0.3, 0.302, 0.5, 0.6, 0.05, 0.0)))
    assert OBJECTIVES[name](batch, torch.ones(1)).item() != OBJECTIVES[name](batch, 2 * torch.ones(1)).item()
