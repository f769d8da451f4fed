import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.method.modifiers import modified, safeguarded, softened
from workbench.method.noise import residual_product, squared_error
from workbench.method.objectives import OBJECTIVES, PairErrors, dpo, linear

DPO = partial(dpo, beta=1.0)  # far from where its sigmoid saturates


def errors(predicted, target, reference=None) -> PairErrors:
    """Errors of predictions of winners, then losers, (2B, N); the reference predicts the target but for a little."""
    reference = target + 0.5 if reference is None else reference
    distance = squared_error(*(x.chunk(2)[0] for x in (predicted, reference)))
    parts = (*squared_error(predicted, target).chunk(2), *squared_error(reference, target).chunk(2))
    return PairErrors(*parts, distance, residual_product(predicted, target))


def slopes(objective, a, b, **modifiers):
    """Gradients of the mean loss in the predictions, of one pair whose residuals are a and b."""
    predicted = torch.tensor([a, b], requires_grad=True)
    modified(objective, errors(predicted, torch.zeros(2, len(a))), torch.ones(1), **modifiers).mean().backward()
    return predicted.grad


def test_the_safeguard_by_hand():
    # <a, a> = 1, <b, a> = 4: the loser's gradient is scaled by (1 - 0.2) / 4 = 0.2. Linear: dL/dm_w = beta/2 = 5,
    # dL/dm_l = -5; m is the mean over 2 elements, so dm/dx = x.
    found = slopes(partial(linear, beta=10.0), [1.0, 0.0], [4.0, 1.0], safeguard=True, mu=0.2)
    torch.testing.assert_close(found, torch.tensor([[5.0, 0.0], [-0.2 * 20, -0.2 * 5]]))


def test_there_is_one_scale_for_a_batch_made_of_its_sums():
    # <a, a> = 1 + 4 = 5, <b, a> = 4 + 6 = 10: 1/2 for both pairs, though the first alone would have 1/4, the second 2/3
    predicted = torch.tensor([[1.0], [2.0], [4.0], [3.0]], requires_grad=True)
    linear(safeguarded(errors(predicted, torch.zeros(4, 1)), 0.0), torch.ones(2), beta=1.0).sum().backward()
    assert predicted.grad.flatten().tolist() == pytest.approx([1.0, 2.0, -0.5 * 4, -0.5 * 3])


def test_a_loser_whose_gradient_helps_the_winner_is_left_alone():
    for loser in ([-2.0, 0.5], [0.0, 3.0]):
        plain, guarded = (slopes(DPO, [1.0, 0.0], loser, safeguard=on) for on in (False, True))
        assert torch.equal(plain, guarded)


def test_a_scale_is_at_most_1():
    plain, guarded = (slopes(DPO, [2.0, 0.0], [0.5, 1.0], safeguard=on) for on in (False, True))
    assert torch.equal(plain, guarded)


def test_mu_of_1_leaves_no_gradient_of_a_loser_that_works_against_the_winner():
    found = slopes(DPO, [1.0, 0.0], [2.0, 1.0], safeguard=True, mu=1.0)
    assert found[0].abs().sum() > 0 and found[1].abs().sum() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_safeguard_never_changes_the_value_of_a_loss_nor_the_winners_own_slope(name):
    predicted, target = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0)) * 0.3
    plain = errors(predicted, target)
    for mu in (0.0, 0.5, 1.0):
        ours, theirs = (modified(OBJECTIVES[name], plain, torch.ones(4), safeguard=on, mu=mu) for on in (True, False))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_modifiers_an_objective_is_itself_to_the_bit(name):
    batch = errors(*torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(modified(OBJECTIVES[name], batch, torch.ones(4)), OBJECTIVES[name](batch, torch.ones(4)))


def test_no_gradient_flows_through_the_scale():
    """With the scale fixed the slope in the winner's prediction is the winner's own."""
    guarded = slopes(partial(linear, beta=10.0), [1.0, 2.0], [3.0, 4.0], safeguard=True)
    plain = slopes(partial(linear, beta=10.0), [1.0, 2.0], [3.0, 4.0])
    torch.testing.assert_close(guarded[0], plain[0])


def test_a_swapped_pair_is_scaled_by_its_own_winner():
    # <a, a> = 1, <b, a> = 2: 1/2. Swapped: 5 / 2, so 1: the same two images, but the other one to be kept.
    pair, swap = ([1.0, 0.0], [2.0, 1.0]), ([2.0, 1.0], [1.0, 0.0])
    for (a, b), share in ((pair, 0.5), (swap, 1.0)):
        guarded, plain = (slopes(linear, a, b, safeguard=on)[1] for on in (True, False))
        torch.testing.assert_close(guarded, share * plain)


vectors = st.lists(st.floats(-2, 2), min_size=12, max_size=12)


@given(vectors, st.sampled_from(["dpo", "dmpo", "linear"]), st.floats(0, 1))
def test_to_first_order_the_winners_error_does_not_grow(values, name, mu):
    """Winner and loser are predicted with one shared offset, so that the loser's gradient pulls at the winner too."""
    residuals = torch.tensor(values, dtype=torch.float64).view(2, 6)
    offset = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    found = errors(residuals + offset, torch.zeros(2, 6, dtype=torch.float64))
    (winner,) = torch.autograd.grad(found.policy_w.sum(), offset, retain_graph=True)
    loss = modified(partial(OBJECTIVES[name], beta=1.0), found, torch.ones(1), safeguard=True, mu=mu)
    (step,) = torch.autograd.grad(loss.sum(), offset)
    assert -(winner @ step).item() <= 1e-5  # the change of m_w for a small step down the loss


def test_without_the_safeguard_the_winners_error_can_grow():
    a, b = [1.0, 0.0], [4.0, 1.0]
    moves = {on: -slopes(DPO, a, b, safeguard=on).sum(0) @ torch.tensor(a) for on in (False, True)}
    assert moves[False] > 0 >= moves[True] - 1e-6


def test_residuals_of_equal_images_are_their_error():
    x, y = torch.randn(2, 3, 5)
    torch.testing.assert_close(residual_product(torch.cat([x, x]), torch.cat([y, y])), squared_error(x, y))
    assert not residual_product(x[:2].requires_grad_(), y[:2]).requires_grad


def test_dpo_is_log_2_at_the_start_with_a_safeguard():
    predicted = torch.randn(4, 6)
    start = errors(predicted, torch.zeros(4, 6), reference=predicted)
    assert modified(dpo, start, torch.ones(2), safeguard=True).tolist() == pytest.approx([math.log(2)] * 2)


def test_soft_labels_by_hand():
    # gap = log 3: p = 3 / 4, so the margin counts 2 p - 1 = 1/2; -10 / 2 * 1/2 * 0.3
    parts = [torch.tensor([v]) for v in (0.3, 0.7, 0.5, 0.6, 0.0, 0.0)]
    batch = PairErrors(*parts, gap=torch.tensor([math.log(3)]))
    soft = partial(modified, partial(linear, beta=10.0), batch, torch.ones(1), label="soft")
    assert soft().item() == pytest.approx(-0.75)
    assert soft(temperature=1e-3).item() == pytest.approx(-1.5)  # as sure as a hard label
    assert soft(temperature=1e6).item() == pytest.approx(0, abs=1e-5)


def test_equal_scores_teach_nothing_and_opposite_scores_turn_a_pair_round():
    lam = torch.tensor([1.0, 2.0, 1.0])
    found = softened(lam, torch.tensor([0.0, 1.5, -1.5]), 0.5)
    assert found[0] == 0 and found[1] == -2 * found[2] and found[1] > 0
    parts = (torch.tensor([v]) for v in (0.3, 0.7, 0.5, 0.6, 0.0, 0.0))
    batch = PairErrors(*parts, gap=torch.zeros(1))
    assert modified(dpo, batch, torch.ones(1), label="soft").item() == pytest.approx(math.log(2))


def test_a_soft_label_is_the_geometric_mean_of_both_orders():
    """p log-odds(pair) + (1 - p) log-odds(swapped pair), inside one sigmoid."""
    gap, beta = 0.8, 4.0
    p = 1 / (1 + math.exp(-gap))
    margin = 0.3
    logit = p * beta / 2 * margin + (1 - p) * beta / 2 * -margin
    batch = PairErrors(*(torch.tensor([v]) for v in (0.3, 0.7, 0.5, 0.6, 0.0, 0.0)), gap=torch.tensor([gap]))
    found = modified(partial(dpo, beta=beta), batch, torch.ones(1), label="soft").item()
    assert found == pytest.approx(math.log1p(math.exp(-logit)))
