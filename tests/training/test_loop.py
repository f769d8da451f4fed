import math
from functools import partial

import pytest
import torch
from torch import Generator, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from workbench.data.pairs import Batch
from workbench.method.noise import diffusion
from workbench.method.objectives import dpo, sft
from workbench.method.reference import Divergence, Reference, Rule
from workbench.method.reward_scale import inverse_sqrt_snr, scale
from workbench.method.timesteps import uniform
from workbench.training.loop import as_floats, pair_errors, train

ABAR = torch.linspace(0.99, 0.01, 20)
PROCESS = diffusion(ABAR)


class Toy(nn.Module):
    """Predicts noise as one convolution of x_t, plus the text's mean."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, text):
        return self.conv(x) + text.mean((1, 2)).view(-1, 1, 1, 1)


def denoise(model, x_t, t, condition):
    return model(x_t, t, condition["text"])


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy()


def batch(size=4, seed=1):
    g = Generator().manual_seed(seed)
    return Batch(*torch.randn(2, size, 2, 4, 4, generator=g), {"text": torch.randn(size, 3, 2, generator=g)})


def endless(size=4):
    seed = 0
    while True:
        seed += 1
        yield batch(size, seed)


def start(
    rule=None, steps=6, accumulation=1, objective=None, lam=None, lr=1e-2, batches=None, reference_model=None, clip=1.0
):
    policy = toy()
    measure = lambda m: Divergence((m.conv.weight - toy().conv.weight).square().mean().item(), 0.0)  # noqa: E731
    reference = Reference(reference_model or toy(), rule or Rule(), measure, lambda: dict(toy().named_parameters()))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    loop = train(
        policy,
        reference,
        batches or endless(),
        denoise=denoise,
        objective=objective or partial(dpo, beta=100.0),
        process=PROCESS,
        density=uniform(ABAR),
        lam=torch.ones(20) if lam is None else lam,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        scaler=torch.amp.GradScaler(enabled=False),
        steps=steps,
        accumulation=accumulation,
        clip=clip,
        generator=Generator().manual_seed(0),
    )
    return policy, reference, loop


def test_winner_and_loser_share_timestep_and_noise():
    same = batch()._replace(x_l=batch().x_w)
    t, eps = torch.tensor([0, 5, 10, 19]), torch.randn(4, 2, 4, 4)
    e = pair_errors(denoise, toy(), toy(3), same, t, eps, PROCESS)
    assert torch.equal(e.policy_w, e.policy_l) and torch.equal(e.reference_w, e.reference_l)


def test_errors_agree_with_each_image_alone():
    b, t, eps = batch(), torch.tensor([0, 5, 10, 19]), torch.randn(4, 2, 4, 4)
    e = pair_errors(denoise, toy(), toy(3), b, t, eps, PROCESS)
    alone = (toy(3)(PROCESS.x_t(b.x_l, eps, t), t, b.condition["text"]) - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(e.reference_l, alone)
    assert not e.reference_w.requires_grad and e.policy_w.requires_grad


def test_residuals_agree_with_each_image_alone():
    b, t, eps = batch(), torch.tensor([0, 5, 10, 19]), torch.randn(4, 2, 4, 4)
    e = pair_errors(denoise, toy(), toy(3), b, t, eps, PROCESS)
    a, l = (toy()(PROCESS.x_t(x0, eps, t), t, b.condition["text"]) - eps for x0 in (b.x_w, b.x_l))  # noqa: E741
    torch.testing.assert_close(e.residuals, (a * l).mean((1, 2, 3)))
    assert not e.residuals.requires_grad


def test_the_first_loss_is_log_2_and_its_margin_zero():
    _, _, loop = start()
    first = as_floats([next(loop)])[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5


def test_the_logit_is_exactly_zero_in_the_step_after_a_hard_copy():
    _, _, loop = start(Rule(interval=3), steps=7)
    margins = [row["rewards/margins"] for row in as_floats(list(loop))]
    assert margins[0] == margins[3] == margins[6] == 0
    assert all(margins[i] != 0 for i in (1, 2, 4, 5))


def test_constant_lambda_and_a_frozen_reference_are_diffusion_dpo():
    """Against an independent few-line implementation of the public loop."""
    policy, _, loop = start(steps=5)
    ours = [row["train/loss"] for row in as_floats(list(loop))]
    model, frozen = toy(), toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    g, batches, theirs = Generator().manual_seed(0), endless(), []
    for _ in range(5):
        b = next(batches)
        t = torch.multinomial(torch.full((20,), 1 / 20, dtype=torch.float64), 4, replacement=True, generator=g)
        eps = torch.randn(b.x_w.shape, generator=g)
        difference = {}
        for name, x0 in (("w", b.x_w), ("l", b.x_l)):
            a = ABAR[t][:, None, None, None]
            x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
            with torch.no_grad():
                fixed = (frozen(x_t, t, b.condition["text"]) - eps).pow(2).mean(dim=[1, 2, 3])
            difference[name] = (model(x_t, t, b.condition["text"]) - eps).pow(2).mean(dim=[1, 2, 3]) - fixed
        loss = -nn.functional.logsigmoid(-0.5 * 100.0 * (difference["w"] - difference["l"])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-5)
    for a, b in zip(policy.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lambda_of_the_drawn_timesteps_reaches_the_objective():
    lam = scale(inverse_sqrt_snr(ABAR.double()))
    seen = []

    def spy(errors, at_t):
        seen.append(at_t)
        return sft(errors, at_t)

    _, _, loop = start(objective=spy, lam=lam, steps=3)
    list(loop)
    t = uniform(ABAR).multinomial(4, replacement=True, generator=Generator().manual_seed(0))
    assert torch.equal(seen[0], lam[t])


def test_order_of_one_step():
    """Optimizer step, then the reference's move, then the record."""
    events = []
    policy, reference, loop = start(Rule(interval=1), steps=2)
    before = policy.conv.weight.detach().clone()
    original = reference.after_step

    def after_step(step, model):
        assert not torch.equal(model.conv.weight, before)
        events.append(("reference", step))
        return original(step, model)

    reference.after_step = after_step
    for record in loop:
        events.append(("record", record.step))
        assert torch.equal(reference.model.conv.weight, policy.conv.weight)
    assert events == [("reference", 1), ("record", 1), ("reference", 2), ("record", 2)]


def test_accumulating_two_equal_halves_is_one_batch():
    """Errors that depend on no draw: the mean gradient of two halves is the whole's."""

    def weight_norm(errors, lam):
        return errors.policy_w * 0 + held[0].conv.weight.square().sum()

    held, norms = [], []
    for accumulation in (1, 2):
        policy, _, loop = start(objective=weight_norm, steps=1, accumulation=accumulation)
        held[:] = [policy]
        norms.append(as_floats(list(loop))[0])
    assert norms[0]["train/loss"] == pytest.approx(norms[1]["train/loss"])
    assert norms[0]["train/grad_norm"] == pytest.approx(norms[1]["train/grad_norm"])


def test_gradients_are_clipped_and_the_norm_before_is_recorded():
    policy, _, loop = start(objective=sft, steps=1, clip=1e-3)
    seen = []
    hook = register_optimizer_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in policy.parameters()))
    assert as_floats([next(loop)])[0]["train/grad_norm"] > 1e-3
    hook.remove()
    assert math.sqrt(sum(g.square().sum() for g in seen)) == pytest.approx(1e-3, rel=1e-3)
    assert all(p.grad is None for p in policy.parameters())  # what comes between two steps has their memory


def test_a_number_that_is_not_finite_raises_naming_step_and_numbers():
    def poisoned():
        yield batch()
        yield batch()._replace(x_w=torch.full((4, 2, 4, 4), float("nan")))

    _, _, loop = start(batches=poisoned(), steps=2)
    next(loop)
    with pytest.raises(FloatingPointError, match=r"step 2: not finite \(train/loss = nan"):
        next(loop)


def test_records_hold_no_graph():
    _, _, loop = start(steps=1)
    assert not next(loop).values.requires_grad


def test_the_same_seeds_give_the_same_run():
    a, b = (as_floats(list(start(Rule(interval=2))[2])) for _ in range(2))
    assert a == b
