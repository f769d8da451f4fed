"""What figures and tables call an arm: the paper's name of a method where the arm's settings are that method's."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from workbench.analysis.paper import LABELS, TUNED

LOSSES = {"sft": "SFT", "kto": "Diffusion-KTO", "dspo": "DSPO"}  #: objective.loss -> the method that it makes

#: Settings that decide which method a run is, each with the value that it has where a run lacks it.
DECISIVE = {
    "objective.loss": "dpo",
    "objective.safeguard": "False",
    "objective.label": "hard",
    "timesteps.density": "uniform",
    "reward_scale.shape": "constant",
    "reference.policy": "frozen",
    "reference.on_exceed": "freeze",
}

#: What a label says of an arm's settings beside its method, for labels that are no method's: arm -> settings.
SAID: dict[str, dict[str, str]] = {
    "lr-high": {"objective.loss": "dpo", "reference.policy": "frozen"},
    "beta-low": {"objective.loss": "dpo", "reference.policy": "frozen"},
    "reinit": {"reference.policy": "threshold", "reference.on_exceed": "reinit"},
    "gamma-8": {"timesteps.gamma": "0.8", "reward_scale.shape": "constant"},
    "gamma-8-scale": {"timesteps.gamma": "0.8"},
    "gamma-9": {"timesteps.gamma": "0.9", "reward_scale.shape": "constant"},
    "sdpo": {"objective.safeguard": "True", "reference.policy": "frozen"},
    "sdpo-threshold": {"objective.safeguard": "True", "reference.policy": "threshold"},
    "linear-ema": {"objective.loss": "linear", "reference.policy": "ema"},
    "noise-delta": {"reference.policy": "noise"},
}


def label(arm: str) -> str:
    """The label of an arm of which the name alone is known, such as a model in an evaluation."""
    method = arm.removeprefix(TUNED)
    return LABELS.get(method, method) + (", tuned" if method != arm else "")


def method(settings: Mapping[str, Any]) -> str:
    """The paper's name of the method that some settings make; empty where they make none that has a name.

    Learning rate, beta, interval and delta do not matter.

    Args:
        settings: by dotted name, as text; those of DECISIVE are looked at.
    """
    has = {name: str(settings[name]) if settings.get(name) is not None else usual for name, usual in DECISIVE.items()}
    loss, policy = has["objective.loss"], has["reference.policy"]
    if has["objective.safeguard"] == "True" or has["objective.label"] == "soft" or loss not in ("dpo", *LOSSES):
        return ""
    if loss in LOSSES:
        return LOSSES[loss]
    skewed, scaled = has["timesteps.density"] != "uniform", has["reward_scale.shape"] != "constant"
    if policy == "frozen" and skewed == scaled:
        return LABELS["timestep-aware"] if skewed else LABELS["frozen"]
    if policy == "threshold" and skewed and scaled and has["reference.on_exceed"] == "freeze":
        return LABELS["ours"]
    return ""


def labels(runs: pl.DataFrame) -> dict[str, str]:
    """What each arm of a study is called, "pretrained" among them; no two arms are called the same.

    An arm has the label of its name only if its runs' settings are what the label says. An arm of another name whose
    settings are those of a method is called by the method, with its own name in brackets.

    Args:
        runs: of `tracking.load_runs`; where they have no settings, names decide alone.
    """
    known = any(name in runs.columns for name in ("objective.loss", "timesteps.density"))
    called = {"pretrained": LABELS["pretrained"]}
    for arm in runs["arm"].unique(maintain_order=True):
        settings = runs.row(by_predicate=pl.col("run_id") == _first(runs, arm), named=True)
        # Runs whose settings the sampler chose are of many methods under this one name.
        called[arm] = _label_of(arm, settings) if known and arm != "sampled" else label(arm)
    return called


def _first(runs: pl.DataFrame, arm: str) -> str:
    return str(runs.filter(pl.col("arm") == arm)["run_id"][0])


def _label_of(arm: str, settings: Mapping[str, Any]) -> str:
    """The label of an arm of these settings."""
    name, found = arm.removeprefix(TUNED), method(settings)
    if name in SAID:
        usual = DECISIVE | {"timesteps.gamma": ""}
        has = {key: str(settings.get(key) or usual[key]) for key in SAID[name]}
        return label(arm) if has == SAID[name] else arm
    if found and LABELS.get(name) == found:
        return label(arm)
    return f"{found} ({arm})" if found else arm if name in LABELS else label(arm)
