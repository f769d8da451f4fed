"""The paper's claims as rules, written before the runs: what is measured for each; `verdicts` says when it holds.

Every claim comes down to effects, one number a training seed, signed so that the paper says "greater than 0".

Arms are compared seed by seed: the same order of the data, the same draws of timesteps and noise. Seeds differ in
nothing else: pairs, test prompts and their noise, probe and pretrained model are the same in all, so that an interval
says what other training seeds would give on these, not what other pairs or prompts would. "Reward" is `eval/reward`,
the mean ground-truth reward of samples of the test prompts.

To add a claim: write a function of the evidence and decorate it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from workbench.analysis.claims import regime
from workbench.analysis.claims.evidence import Effect, Evidence, Values, seedwise

AGREEMENT = 0.05  # Eq. 8 and the kernel KL agree where they differ by less than this share
FURTHER = 3.0  # "much further": so many times as far
#: Share by which a level on a probe may lie beyond delta: two probes of 128 images, each of which knows a level to
#: about a tenth of delta, the same in every training seed.
LEVEL = 0.25
#: Ends of arms' names by the interval of reference updates, shortest first: the paper's 16, 32 and 64.
INTERVALS = ("-half", "", "-double")
MODERATE = 0.1  # the fixed probe's variance is at most this share of the batch subset's


class Claim(NamedTuple):
    """A claim of the paper, or of ours.

    Attributes:
        title: the statement, in our words.
        where: the paper's figure, table or section.
        arms: whose runs it rests on; empty for the checks.
        measure: its effects from the evidence.
    """

    number: int
    title: str
    where: str
    arms: tuple[str, ...]
    measure: Callable[[Evidence], list[Effect]]


CLAIMS: list[Claim] = []


def claim(number: int, title: str, where: str, *arms: str) -> Callable[[Callable], Callable]:
    """Enter a rule into CLAIMS."""

    def enter(measure: Callable[[Evidence], list[Effect]]) -> Callable[[Evidence], list[Effect]]:
        CLAIMS.append(Claim(number, title, where, arms, measure))
        return measure

    return enter


def minus(a: float, b: float) -> float:
    """a - b, the formula of most effects."""
    return a - b


def gain(e: Evidence, arm: str, other: str) -> Values:
    """Final reward of an arm minus another's."""
    return seedwise(minus, e.final(arm, "eval/reward"), e.final(other, "eval/reward"))


@claim(
    1,
    "Frozen Diffusion-DPO stays close to the pretrained model; reference updates move much further",
    "Fig. 1b",
    "frozen",
    "update",
    "threshold",
)
def stays_close(e: Evidence) -> list[Effect]:
    """At one learning rate and beta, frozen ends about at delta or below, the moving reference over 3 times as far.

    These are the two lines that Fig. 1b draws: with updates the reference's divergence, with a frozen reference, which
    has none, the policy's. "About": up to a quarter beyond, as the regime has it.
    """
    moving, frozen = e.final("update", "divergence/reference"), e.final("frozen", "divergence/policy")
    delta = e.setting("threshold", "reference.delta")
    near = seedwise(lambda d, f: regime.CLOSE * d - f, delta, frozen)
    far = seedwise(lambda m, f: m - FURTHER * max(f, 0.0), moving, frozen)
    return [
        Effect(f"{regime.CLOSE:g} x delta minus divergence of the frozen arm's policy", near, "divergence"),
        Effect(f"divergence of the moving reference minus {FURTHER:g} x the frozen arm's policy's", far, "divergence"),
    ]


@claim(
    2,
    "Without a threshold, margin and divergence keep growing, and the winners' error grows too",
    "Fig. 1b",
    "update",
)
def keeps_growing(e: Evidence) -> list[Effect]:
    """Margin and error, on validation pairs, rise from half-way to the end, the divergence still in the last quarter.

    For the middle interval. Validation pairs are looked at three times in a run, the reference at each of its updates.
    """
    growth = [
        ("margin against the pretrained model, end minus half-way", "validation/margin", 0.5, "error"),
        ("divergence of the reference, end minus three quarters", "divergence/reference", 0.75, "divergence"),
        ("winners' error over the pretrained model's, end minus half-way", "validation/divergence", 0.5, "error"),
    ]
    return [
        Effect(name, seedwise(float, e.growth("update", metric, since)), unit) for name, metric, since, unit in growth
    ]


@claim(3, "Smaller intervals diverge faster", "section on reference updates", "update-half", "update", "update-double")
def smaller_is_faster(e: Evidence) -> list[Effect]:
    """Divergence at the end falls with the interval, neighbour by neighbour, at one learning rate and beta."""
    arms = [f"update{end}" for end in INTERVALS]
    return [
        Effect(
            f"divergence, {a} minus {b}",
            seedwise(minus, e.final(a, "divergence/policy"), e.final(b, "divergence/policy")),
            "divergence",
        )
        for a, b in pairwise(arms)
    ]


@claim(4, "With the threshold, the reference stays at or below delta", "Fig. 1b", "threshold", "threshold-half")
def stays_below(e: Evidence) -> list[Effect]:
    """The reference has moved often, and lies below delta on winners that neither threshold nor training ever saw.

    "Often": 8 times, as the regime has it. "Below": up to a quarter beyond, since the error of the two probes, which is
    the same in all seeds, is not in an interval over seeds. On the threshold's own probe it cannot exceed delta, since
    a candidate that does is refused: that is shown and decides nothing.
    """
    effects = []
    for arm in ("threshold", "threshold-half"):
        delta = e.setting(arm, "reference.delta")
        effects += [
            Effect(
                f"{arm}: accepted updates minus {regime.UPDATES}",
                seedwise(lambda updates: updates - regime.UPDATES, e.final(arm, "reference/updates")),
                "updates",
            ),
            Effect(
                f"{arm}: {1 + LEVEL:g} x delta minus the last divergence on unseen winners",
                seedwise(lambda d, far: (1 + LEVEL) * d - far, delta, e.final(arm, "divergence/reference_unseen")),
                "divergence",
            ),
            Effect(
                f"{arm}: delta minus the largest divergence on the probe",
                seedwise(minus, delta, e.peak(arm, "divergence/reference")),
                "divergence",
                decides=False,
            ),
        ]
    return effects


#: Arms that differ in how far their reference may go and in nothing else: not at all, about delta, and without bound.
NEVER, ABOUT, UNBOUNDED = (
    ("frozen",),
    ("range-low", "threshold", "range-double"),
    ("update-double", "update", "update-half"),
)
RANGE = (*NEVER, *ABOUT, "range-high", "range-higher", *UNBOUNDED)


@claim(5, "True reward against divergence rises to an optimum, then falls", "Fig. 1c", *RANGE)
def rises_then_falls(e: Evidence) -> list[Effect]:
    """References held about at delta score above a frozen one, and above those that nothing holds.

    One learning rate and beta for all. The groups are of what was set, a threshold of 0.4, 1 and 2 times delta against
    none in either direction, so that no run's own noise decides where it belongs. Thresholds of 4 and 8 times delta lie
    between the groups; they are drawn, and shown here.
    """
    reward = {arm: e.final(arm, "eval/reward") for arm in RANGE}

    def above(arms: tuple[str, ...], others: tuple[str, ...]) -> Values:
        def contrast(*values: float) -> float:
            of = dict(zip(reward, values, strict=True))
            return float(np.mean([of[arm] for arm in arms]) - np.mean([of[arm] for arm in others]))

        # Of all arms, whichever are compared: a seed that lacks a run of one counts in no effect.
        return seedwise(contrast, *reward.values())

    wide = ("range-high", "range-higher")
    return [
        Effect("reward, threshold of 0.4 to 2 delta minus frozen", above(ABOUT, NEVER)),
        Effect("reward, threshold of 0.4 to 2 delta minus no threshold", above(ABOUT, UNBOUNDED)),
        Effect("reward, threshold of 0.4 to 2 delta minus 4 to 8 delta", above(ABOUT, wide), decides=False),
    ]


@claim(6, "Model loss, reward scale and accuracy are lower at high noise", "Fig. 2a-c", "frozen")
def imbalanced(e: Evidence) -> list[Effect]:
    """A trend over the timestep intervals, for Diffusion-DPO: minus Spearman's rank correlation with the noise.

    1 where every interval lies below the one before it, 0 where there is no trend. Ranks, since the values of the least
    noisy interval are so large that they alone would decide a mean or a slope.
    """
    return [
        Effect(f"{name}: fall with the noise", seedwise(_fall, e.buckets("frozen", quantity)), "rank correlation")
        for quantity, name in (("loss", "model loss"), ("reward_size", "reward size"), ("accuracy", "accuracy"))
    ]


def _fall(values: Values) -> float:
    """Minus the rank correlation of values with their places; 0 where all are equal."""
    return -float(spearmanr(np.arange(len(values)), values).statistic) if np.ptp(values) else 0.0


@claim(
    7,
    "Without the threshold small intervals hurt; with it every interval beats Diffusion-DPO, and the interval "
    "matters less",
    "Fig. 4",
    "frozen", "update-half", "update-double", *(f"threshold{end}" for end in INTERVALS),
)  # fmt: skip
def interval_matters_less(e: Evidence) -> list[Effect]:
    """Longest against shortest interval, each thresholded arm against frozen, and the same contrast with a threshold.

    A contrast with its sign, and not a range: of noisy values a range is large where they are merely noisier.
    """
    ends = [e.final(f"{kind}{end}", "eval/reward") for kind in ("update", "threshold") for end in ("-double", "-half")]
    narrower = seedwise(lambda *r: (r[0] - r[1]) - (r[2] - r[3]), *ends)
    return [
        Effect("reward, no threshold: longest interval minus shortest", gain(e, "update-double", "update-half")),
        *(
            Effect(f"reward, threshold{end} minus Diffusion-DPO", gain(e, f"threshold{end}", "frozen"))
            for end in INTERVALS
        ),
        Effect("longest interval minus shortest, without minus with threshold", narrower),
    ]


@claim(
    8,
    "Timestep-aware training alone hurts frozen Diffusion-DPO; with updates it helps",
    "Table 4, top",
    "frozen", "timestep-aware", "threshold", "ours",
)  # fmt: skip
def needs_updates(e: Evidence) -> list[Effect]:
    """The signs of the paper's table: alone below Diffusion-DPO, on top of thresholded updates above them."""
    return [
        Effect("reward, Diffusion-DPO minus timestep-aware alone", gain(e, "frozen", "timestep-aware")),
        Effect("reward, ours minus thresholded updates alone", gain(e, "ours", "threshold")),
    ]


@claim(
    9,
    "lambda(t) on top of oversampling helps, and lowers divergence at early steps",
    "Table 4, bottom; Fig. 5",
    "gamma-9", "ours", "gamma-8", "gamma-8-scale",
)  # fmt: skip
def scale_helps(e: Evidence) -> list[Effect]:
    """With and without lambda(t), mean of both discounts; divergence over the noisier half of the timesteps.

    The paper's statement is about lambda(t), at whatever discount. The effect is small, and both discounts together are
    twice the images. Each alone is shown.
    """
    both = seedwise(
        lambda *rewards: (rewards[0] - rewards[1] + rewards[2] - rewards[3]) / 2,
        *(e.final(arm, "eval/reward") for arm in ("ours", "gamma-9", "gamma-8-scale", "gamma-8")),
    )
    without, scaled = e.noisier_half("gamma-9", "divergence"), e.noisier_half("ours", "divergence")
    return [
        Effect("reward, with minus without lambda(t), mean of gamma .9 and .8", both),
        Effect("reward, the same at gamma .9", gain(e, "ours", "gamma-9"), decides=False),
        Effect("reward, the same at gamma .8", gain(e, "gamma-8-scale", "gamma-8"), decides=False),
        Effect("divergence at t >= 500, without minus with lambda(t)", seedwise(minus, without, scaled), "divergence"),
    ]


@claim(
    10,
    "A raised learning rate collapses, a lower beta does not replace updates, re-initialising gives less than freezing",
    "Table 3",
    "lr-high", "beta-low", "threshold", "reinit",
)  # fmt: skip
def no_substitute(e: Evidence) -> list[Effect]:
    """Collapse is a reward below the pretrained model's; the other two are compared with thresholded updates.

    The paper's table compares them with the whole method. Without timestep-aware training they differ in one thing.
    """
    lost = seedwise(lambda gained: -gained, e.final("lr-high", "eval/reward_gain"))
    return [
        Effect("reward, pretrained minus learning rate x 5", lost),
        Effect("reward, thresholded updates minus beta / 5", gain(e, "threshold", "beta-low")),
        Effect("reward, freezing minus re-initialising beyond delta", gain(e, "threshold", "reinit")),
    ]


BASELINES = {"sft": "SFT", "tuned-frozen": "Diffusion-DPO", "kto": "Diffusion-KTO", "dspo": "DSPO"}


@claim(11, "The whole method wins more than half of same-seed comparisons", "Table 1", "tuned-ours", *BASELINES)
def wins_more_than_half(e: Evidence) -> list[Effect]:
    """Win rate of ours against the pretrained model and each baseline minus one half, ties half.

    Each at the settings that its search found.
    """
    pretrained = seedwise(lambda rate: rate - 0.5, e.final("tuned-ours", "eval/win_rate"))
    against = [
        (name, seedwise(lambda rate: rate - 0.5, e.win_rate("tuned-ours", arm))) for arm, name in BASELINES.items()
    ]
    return [
        Effect(f"win rate against {name} minus 1/2", values, "share")
        for name, values in (("the pretrained model", pretrained), *against)
    ]


@claim(12, "A language model's margin gradient is bounded, a squared error's is not", "Theorem 1")
def bounded(e: Evidence) -> list[Effect]:
    """Largest gradient against the proved bound 2 sqrt 2 K T; slope of the squared error's in the parameters' scale."""
    below = seedwise(lambda share: 1 - share, e.check("check/softmax_over_bound"))
    slope = seedwise(lambda slope: slope - 0.5, e.check("check/squared_slope"))
    return [
        Effect("1 minus largest softmax gradient / bound", below, "share"),
        Effect("log-log slope of the squared error's minus 1/2", slope, "slope"),
    ]


@claim(
    13,
    "Eq. 8 equals the kernel KL where it must, and a fixed probe sees changes with far less noise",
    "beyond it; Eq. 7, 8",
)
def forms_agree(e: Evidence) -> list[Effect]:
    """Agreement within 5 % with a known optimal denoiser; variance of a change at most a tenth of the batch subset's.

    A fixed probe is for changes: a curve over training, or one candidate against the next. Its level carries the error
    of its own choice through the whole run, where the errors of fresh subsets average out; only more images help there.
    So the level's variance is shown and decides nothing.
    """
    far = seedwise(lambda a, b: AGREEMENT - abs(a / b - 1), e.check("check/optimal_eq8"), e.check("check/optimal_kl"))
    variance = {
        name: seedwise(lambda ratio: MODERATE - ratio, e.check(f"check/{name}_variance_ratio"))
        for name in ("change", "level")
    }
    statement = f"{MODERATE:g} minus variance of {{}}, fixed probe / batch subset"
    return [
        Effect(f"{AGREEMENT:g} minus how far Eq. 8 is from the kernel KL, relative, optimal denoiser", far, "share"),
        Effect(statement.format("a change between candidates"), variance["change"], "share"),
        Effect(statement.format("the level"), variance["level"], "share", decides=False),
    ]


@claim(
    14,
    "With learning rate and beta found for each alone, updates below the threshold still beat a frozen reference, and "
    "the whole method beats both",
    "beyond it; Table 4, Fig. 4",
    "tuned-frozen", "tuned-threshold", "tuned-ours",
)  # fmt: skip
def gains_survive_tuning(e: Evidence) -> list[Effect]:
    """The paper compares at one learning rate and beta; a frozen reference may need others than a moving one."""
    return [
        Effect("reward, thresholded updates minus Diffusion-DPO", gain(e, "tuned-threshold", "tuned-frozen")),
        Effect("reward, the whole method minus Diffusion-DPO", gain(e, "tuned-ours", "tuned-frozen")),
        Effect("reward, the whole method minus thresholded updates", gain(e, "tuned-ours", "tuned-threshold")),
    ]
