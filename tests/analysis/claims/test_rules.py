import json
import tomllib
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from workbench.analysis.claims import table
from workbench.analysis.claims.evidence import Effect, Evidence, seedwise
from workbench.analysis.claims.rules import ABOUT, BASELINES, CLAIMS, NEVER, UNBOUNDED, Claim
from workbench.analysis.claims.verdicts import ABSENT, FAILS, HOLDS, OPEN, judge
from workbench.common.errors import UserError
from workbench.models.small.prompts import split
from workbench.studies.experiment import Experiment
from workbench.studies.tuning import Candidate, Findings

SEEDS = ["0", "1", "2"]
CAPTIONS = [str(prompt) for prompt in split()["test"][:3]]


def evidence(runs: list[dict], history: list[dict] = (), samples: list[dict] = (), checks: list[dict] = ()) -> Evidence:
    return Evidence(*(pl.DataFrame(list(rows), infer_schema_length=None) for rows in (runs, history, samples, checks)))


def rewards(**arms: list[float]) -> Evidence:
    """Final rewards of arms by seed."""
    return evidence([
        {"run_id": f"{arm}-{seed}", "arm": arm, "state": "complete", "seed": seed, "eval/reward": value}
        for arm, values in arms.items() for seed, value in zip(SEEDS, values, strict=False)
    ])  # fmt: skip


def claim_of(effects: list[list[float]]) -> Claim:
    measured = [Effect("x", np.array(values)) for values in effects]
    return Claim(1, "t", "w", (), lambda _: measured)


def verdict(*effects: list[float]) -> str:
    return judge([claim_of(list(effects))], rewards(a=[0.0]))[0]["verdict"]


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ([[1.0, 1.5, 1.2]], HOLDS),
        ([[-1.0, -1.5, -1.2]], FAILS),
        ([[-1.0, 1.0, 0.1]], OPEN),
        ([[1.0, 2.0, 3.0]], OPEN),  # of one sign, but three values of such a spread say little
        ([[0.0, 0.0, 0.0]], OPEN),
        ([[1.0, 2.0]], OPEN),  # two seeds are too few
        ([[-1.0, -1.0]], OPEN),
        ([[1.0, 1.5, 1.2], [1.0, 1.0, 1.0]], HOLDS),
        ([[1.0, 1.5, 1.2], [-1.0, 3.0, 1.0]], OPEN),
        ([[1.0, 1.5, 1.2], [-1.0, -1.1, -1.0], [-1.0, 1.0, 0.0]], FAILS),
        ([[-1.0, -1.5, -1.0]], FAILS),  # alone it is surely below 0,
        ([[1.0, 1.5, 1.2], [-1.0, -1.5, -1.0], [-1.0, 1.0, 0.0]], OPEN),  # but not as one of three
    ],
)
def test_the_rule(effects, expected):
    assert verdict(*effects) == expected


def test_effects_that_are_only_shown_decide_nothing():
    effects = [Effect("a", np.ones(3)), Effect("b", -np.ones(3), "unit", False)]
    rows = judge([Claim(1, "t", "w", (), lambda _: effects)], rewards(a=[0.0]))
    assert rows[0]["verdict"] == HOLDS and rows[0]["effects"][1]["verdict"] == ""


def test_arms_are_compared_over_the_seeds_that_all_have_whatever_their_order():
    assert seedwise(lambda a, b: a - b, {"1": 5.0, "0": 1.0, "2": 9.0}, {"0": 0.0, "1": 3.0}).tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match="common seed"):
        seedwise(lambda a, b: a - b, {"0": 1.0}, {"1": 1.0})


def test_a_missing_arm_is_named_and_the_claim_is_not_measured():
    rows = judge([c for c in CLAIMS if c.number == 8], rewards(frozen=[1.0, 1.0]))
    assert rows[0]["verdict"] == ABSENT and "'timestep-aware'" in rows[0]["reason"]


def test_two_runs_of_a_seed_are_refused():
    e = rewards(a=[1.0])
    with pytest.raises(UserError, match="two runs with seed 0"):
        Evidence(pl.concat([e.runs, e.runs]), e.history, e.samples, e.checks).final("a", "eval/reward")


def test_growth_is_end_minus_half_way():
    e = rewards(a=[0.0, 0.0])
    history = pl.DataFrame(
        [{"run_id": f"a-{s}", "step": t, "m": float(t * (i + 1))} for i, s in enumerate("01") for t in (4, 8, 12, 16)]
    ).sample(fraction=1, shuffle=True, seed=0)
    assert Evidence(e.runs, history, e.samples, e.checks).growth("a", "m") == {"0": 8.0, "1": 16.0}


def world(right: bool) -> Evidence:
    """Runs of every arm in a world where the paper is right about everything, or about nothing."""
    sign = 1.0 if right else -1.0
    reward = dict.fromkeys(
        {arm for c in CLAIMS for arm in c.arms}, 0.0
    ) | {
        "frozen": 0.2, "timestep-aware": 0.2 - 0.1 * sign, "threshold": 0.2 + 0.2 * sign,
        "threshold-half": 0.2 + 0.19 * sign, "threshold-double": 0.2 + 0.21 * sign,
        "range-low": 0.2 + 0.1 * sign, "range-double": 0.2 + 0.1 * sign,
        "ours": 0.2 + 0.4 * sign, "gamma-9": 0.2 + 0.3 * sign, "gamma-8": 0.0,
        "gamma-8-scale": 0.1 * sign, "update-half": -0.3 * sign, "update": -0.1 * sign,
        "update-double": 0.0 + 0.1 * sign,
        "lr-high": -1.0 * sign, "beta-low": 0.1, "reinit": 0.15, "sft": 0.0, "kto": 0.0, "dspo": 0.0,
        "tuned-frozen": 0.2, "tuned-threshold": 0.2 + 0.2 * sign, "tuned-ours": 0.2 + 0.4 * sign,
    }  # fmt: skip
    if not right:  # with a threshold the interval matters more
        reward |= {"update-half": 0.3, "update": 0.3, "update-double": 0.29, "threshold": -0.4, "threshold-double": 0.1}
    runs, history, samples = [], [], []
    for arm, value in reward.items():
        far = {"frozen": 0.001 if right else 0.05, "update": 0.2}.get(arm, 0.1)
        moved = 0.09 if right else 0.001  # of the reference
        far += {"update-half": 0.1 + 0.1 * sign, "update-double": 0.1 - 0.1 * sign}.get(arm, 0.0)
        for i, seed in enumerate(SEEDS):
            run = {"run_id": f"{arm}-{seed}", "arm": arm, "state": "complete", "seed": seed}
            run |= {
                "reference.delta": "0.005",
                "reference/updates": 8.0 + sign * (3.0 + 1e-3 * i),
                "eval/reward": value + 1e-3 * i,
            }
            run |= {"divergence/reference_unseen": 0.006 - 0.002 * sign, "divergence/policy": far}
            run |= {"divergence/reference": moved}
            run |= {"eval/reward_gain": value, "eval/win_rate": 0.5 + 0.3 * sign}
            for bucket in range(10):
                name = f"t{100 * bucket:03d}-{100 * bucket + 99:03d}"
                for quantity in ("loss", "reward_size", "accuracy"):
                    run[f"timestep_{quantity}/{name}"] = 1.0 - sign * bucket * 0.05
                run[f"timestep_divergence/{name}"] = 0.1 + (sign * 0.05 if arm == "gamma-9" else 0.0)
            runs.append(run)
            for step in (1, 2, 3, 4):
                point = dict.fromkeys(
                    ("validation/margin", "divergence/reference", "validation/divergence"), sign * step
                )
                history.append({"run_id": run["run_id"], "step": step} | point)
            samples += [
                {"run_id": run["run_id"], "arm": arm, "caption": c, "image_seed": 0, "reward": value} for c in CAPTIONS
            ]
    checks = [
        {"name": f"seed-{seed}", "check/softmax_over_bound": 0.5 if right else 1.5, "check/optimal_kl": 1.0,
         "check/squared_slope": 1.0 if right else 0.0, "check/optimal_eq8": 1.01 if right else 1.5,
         "check/change_variance_ratio": 0.05 if right else 0.5, "check/level_variance_ratio": 0.05 if right else 0.5}
        for seed in SEEDS
    ]  # fmt: skip
    return evidence(runs, history, samples, checks)


@pytest.mark.parametrize("number", range(1, 15))
def test_every_rule_holds_where_the_paper_is_right_and_fails_where_it_is_wrong(number):
    (rule,) = (c for c in CLAIMS if c.number == number)
    for right, expected in ((True, HOLDS), (False, FAILS)):
        (row,) = judge([rule], world(right))
        assert row["verdict"] == expected, json.dumps(row, indent=1)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({NEVER: 0.3, ABOUT: 0.7, UNBOUNDED: 0.2}, HOLDS),
        ({NEVER: 0.7, ABOUT: 0.3, UNBOUNDED: 0.8}, FAILS),
        ({NEVER: 0.1, ABOUT: 0.5, UNBOUNDED: 0.9}, FAILS),  # rises for ever
    ],
)
def test_an_optimum_lies_about_delta_or_it_does_not(reward, expected):
    by_arm = {arm: value for arms, value in reward.items() for arm in arms} | {"range-high": 9.0, "range-higher": -9.0}
    e = rewards(**{arm: [value, value + 0.01, value + 0.02] for arm, value in by_arm.items()})
    (rule,) = (c for c in CLAIMS if c.number == 5)
    (row,) = judge([rule], e)
    assert row["verdict"] == expected and [effect["decides"] for effect in row["effects"]] == [True, True, False]


def test_lost_runs_leave_a_claim_undecided_and_are_named():
    (rule,) = (c for c in CLAIMS if c.number == 8)
    e = world(True)
    (row,) = judge([rule], Evidence(e.runs, e.history, e.samples, e.checks, {"frozen": ["3", "4"], "kto": ["3"]}))
    assert row["verdict"] == OPEN and row["reason"].startswith("runs that failed or were pruned: frozen (2);")
    gone = e.runs.filter(pl.col("arm") != "frozen")
    (row,) = judge([rule], Evidence(gone, e.history, e.samples, e.checks, {"frozen": ["0", "1", "2"]}))
    assert row["verdict"] == ABSENT and "frozen (3)" in row["reason"]


def test_a_curve_that_stops_rising_does_not_keep_growing():
    (rule,) = (c for c in CLAIMS if c.number == 2)
    e = world(True)
    flat = e.history.with_columns(pl.when(pl.col("step") > 3).then(3).otherwise("divergence/reference").alias("x"))
    history = flat.with_columns(pl.col("x").alias("divergence/reference")).drop("x")
    (row,) = judge([rule], Evidence(e.runs, history, e.samples, e.checks))
    assert row["verdict"] == OPEN and row["effects"][1]["mean"] == 0
    late = e.history.filter(pl.col("step") == 4)
    (row,) = judge([rule], Evidence(e.runs, late, e.samples, e.checks))
    assert row["verdict"] == ABSENT and "lower diagnostics.interval" in row["reason"]


def test_a_trend_over_timesteps_does_not_rest_on_the_largest_interval():
    values = {"falls": [9.0, 0.8, 0.7, 0.6, 0.5], "rises but for one": [9.0, 0.5, 0.6, 0.7, 0.8], "flat": [1.0] * 5}
    found = {}
    for name, means in values.items():
        e = rewards(frozen=[0.0, 0.0, 0.0])
        columns = [pl.lit(v).alias(f"timestep_{q}/t{i}") for q in ("loss", "reward_size", "accuracy")
                   for i, v in enumerate(means)]  # fmt: skip
        e = Evidence(e.runs.with_columns(columns), e.history, e.samples, e.checks)
        (row,) = judge([c for c in CLAIMS if c.number == 6], e)
        found[name] = row["effects"][0]["mean"]
    assert found["falls"] == pytest.approx(1) and found["flat"] == 0 and abs(found["rises but for one"]) < 0.1


@pytest.mark.parametrize("number", [*range(1, 12), 14])
def test_a_lost_seed_costs_a_seed_and_no_more(number):
    (rule,) = (c for c in CLAIMS if c.number == number)
    full = world(True)
    for arm in rule.arms:
        kept = full.runs.filter(pl.col("run_id") != f"{arm}-1")
        (row,) = judge([rule], Evidence(kept, full.history, full.samples, full.checks))
        assert min(effect["seeds"] for effect in row["effects"]) >= 2, row
        assert any(effect["seeds"] == 2 for effect in row["effects"]), (arm, row)


def test_there_are_fourteen_claims_each_stated_and_documented_and_its_arms_are_declared():
    assert [c.number for c in CLAIMS] == list(range(1, 15))
    assert all(c.title and c.where and c.measure.__doc__ for c in CLAIMS)
    tree = tomllib.loads((Path(__file__).parents[3] / "experiments" / "claims.toml").read_text())
    beyond = {"sdpo", "sdpo-threshold", "linear-ema", "noise-delta"}  # arms that no claim of the paper's is about
    assert {arm for c in CLAIMS for arm in c.arms} == set(tree["sweep"]["arms"]) - beyond
    assert set(BASELINES) <= set(tree["sweep"]["arms"])


def test_the_table_states_counts_effects_and_reasons_and_no_text_breaks_it():
    arms = {"ours": {}, "gamma 9": {"like": "ours"}}
    tuning = {"factors": {"train.lr": [1.0]}}
    experiment = Experiment.resolve({"sweep.seeds": [0, 1, 2], "sweep.arms": arms, "sweep.tuning": tuning})
    e = rewards(**{"frozen": [2.0, 2.1, 2.2], "timestep-aware": [1.0] * 3, "threshold": [1.0, 1.0], "ours": [2.0] * 3})
    rows = judge([c for c in CLAIMS if c.number in (8, 10)], e)
    rows[0]["title"] += " | and\nmore"
    for row in rows:
        row["link"] = "http://x"
    findings = Findings({"ours lr=3e-05": Candidate("ours", {"train.lr": 3e-5})}, {"ours lr=3e-05": -1.0})
    text = table.markdown(rows, [], findings, experiment)
    assert "inconclusive: **1** · not measured: **1**" in text
    assert "**+1.1** (+0.852 to +1.35): reward, Diffusion-DPO minus timestep-aware alone" in text
    assert "ours minus thresholded updates alone (2 of 3 seeds ended)" in text
    assert "arm 'lr-high': the study has no finished run" in text
    assert "| ours | train.lr = 3e-05 | 1 | none |" in text and "gamma 9 like ours" in text
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in lines} == {7, 5}
    assert table.plain(rows, []).count("\n") >= 4


@pytest.mark.parametrize(
    ("effects", "says"),
    [
        ([[1.0, 2.0]], "leans with (no verdict)"),
        ([[1.0], [0.5]], "leans with (no verdict)"),
        ([[-1.0, -1.0], [-0.1, 0.0]], "leans against (no verdict)"),
        ([[1.0, 1.0], [-1.0, -1.0]], "mixed (no verdict)"),
        ([[1.0, -1.0]], "mixed (no verdict)"),  # a mean of 0
        ([[1.0, 2.0, 3.0]], "inconclusive"),  # three seeds could have told
        ([[1.0, 1.5, 1.2]], "holds"),
    ],
)
def test_with_too_few_seeds_for_verdicts_the_table_says_which_way_claims_lean(effects, says):
    (row,) = judge([claim_of(effects)], rewards(frozen=[0.0]))
    shown_only = row["effects"][0] | {"mean": -9.0, "decides": False}
    row |= {"link": "http://x", "effects": [*row["effects"], shown_only]}
    experiment = Experiment.resolve({"sweep.seeds": [0, 1], "sweep.arms": {"ours": {}}})
    text, plain = table.markdown([row], [], None, experiment), table.plain([row], [])
    leans = says.endswith("(no verdict)")
    assert f"| {says if leans else f'**{says}**'} |" in text and f"{says}: **1**" in text
    assert f" 1. {says.upper()}: " in plain
    assert all((table.NO_VERDICTS in each) == leans for each in (text, plain))


def test_lost_runs_leave_a_claim_inconclusive_whichever_way_the_others_lean():
    (row,) = judge([claim_of([[1.0, 2.0]])], rewards(frozen=[0.0]))
    assert "INCONCLUSIVE" in table.plain([row | {"reason": "runs that failed or were pruned: frozen (2)"}], [])
