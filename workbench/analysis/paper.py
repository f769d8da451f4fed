"""The numbers that the paper printed, of SD1.5 but for Table 2, to stand beside ours: to be read, not compared.

Source: "Rethinking Direct Preference Optimization in Diffusion Models" (Kang, Lim, Baek and Shim, AAAI 2026,
arXiv 2505.18736). Other model, other data, other rewards than the small model's: what can be compared is which
method comes before which, not any number. Methods go by the names of their arms in experiments/claims.toml.
"""

from typing import NamedTuple

SOURCE = "paper, SD1.5"

TUNED = "tuned-"  #: before the name of an arm that is compared at the settings that its own search found

#: How a figure or table calls an arm.
LABELS: dict[str, str] = {
    "pretrained": "pretrained",
    "sft": "SFT",
    "frozen": "Diffusion-DPO",
    "kto": "Diffusion-KTO",
    "dspo": "DSPO",
    "ours": "ours",
    "lr-high": "learning rate x 5",
    "beta-low": "beta x 1/5",
    "reinit": "re-initialise",
    "timestep-aware": "timestep-aware only",
    "gamma-8": "gamma 0.8",
    "gamma-8-scale": "gamma 0.8 + lambda(t)",
    "gamma-9": "gamma 0.9",
    "sdpo": "Diffusion-SDPO",
    "sdpo-threshold": "Diffusion-SDPO below delta",
    "linear-ema": "Linear-DPO",
    "noise-delta": "delta from the probe's noise",
}


class Scores(NamedTuple):
    """Mean scores by five reward models on the prompts of Pick-a-Pic v2's test set."""

    pickscore: float
    hpsv2: float
    clip: float
    aesthetic: float
    image_reward: float


#: What the paper calls the five, in the order of `Scores`.
SCORE_LABELS = ("PickScore", "HPSv2", "CLIP", "Aesthetic", "ImageReward")

#: Table 1: win rate of ours against each method in per cent, mean over the five reward models, by prompt set.
TABLE_1: dict[str, dict[str, float]] = {
    "Pick-a-Pic v2": {"pretrained": 78.8, "kto": 58.1, "sft": 55.9, "frozen": 67.0, "dspo": 55.9},
    "PartiPrompts": {"pretrained": 78.2, "kto": 62.0, "sft": 61.4, "frozen": 70.0, "dspo": 60.6},
    "HPDv2": {"pretrained": 82.3, "kto": 58.3, "sft": 59.8, "frozen": 70.4, "dspo": 58.9},
}

#: Table 2: the same for SDXL, whose numbers all others here are not.
TABLE_2: dict[str, dict[str, float]] = {
    "Pick-a-Pic v2": {"pretrained": 70.2, "mapo": 65.1, "inpo": 57.6, "frozen": 60.9, "dspo": 56.4},
}

_DIFFUSION_DPO = Scores(21.36, 27.19, 33.84, 5.53, 0.32)
_OURS = Scores(21.93, 27.84, 34.42, 5.75, 0.65)

#: Table 3, other ways to explore: learning rate 5e-8 for 1e-8, beta 1000 for 5000, re-initialising the reference.
TABLE_3: dict[str, Scores] = {
    "frozen": _DIFFUSION_DPO,
    "lr-high": Scores(19.75, 24.95, 29.81, 4.79, -0.39),
    "beta-low": Scores(21.26, 27.16, 33.55, 5.55, 0.23),
    "reinit": Scores(21.50, 27.16, 34.17, 5.57, 0.38),
    "ours": _OURS,
}

#: Table 4, timestep-aware training taken apart; "ours" is gamma 0.9 with lambda(t).
TABLE_4: dict[str, Scores] = {
    "frozen": _DIFFUSION_DPO,
    "timestep-aware": Scores(21.10, 26.57, 33.56, 5.54, 0.16),
    "threshold": Scores(21.88, 27.63, 34.40, 5.70, 0.58),
    "gamma-8": Scores(21.66, 27.49, 34.25, 5.66, 0.52),
    "gamma-8-scale": Scores(21.90, 27.65, 34.42, 5.69, 0.61),
    "gamma-9": Scores(21.82, 27.71, 34.39, 5.71, 0.64),
    "ours": _OURS,
}
