"""Labels say what an arm's settings are, whatever the arm is called."""

import polars as pl

from workbench.analysis.labels import labels, method

WHOLE = {"reference.policy": "threshold", "timesteps.density": "discounted", "reward_scale.shape": "inverse_sqrt_snr"}


def study(**arms: dict[str, str]) -> pl.DataFrame:
    usual = {"objective.loss": "dpo", "timesteps.density": "uniform", "reward_scale.shape": "constant"}
    return pl.DataFrame([{"run_id": arm, "arm": arm.replace("_", "-")} | usual | own for arm, own in arms.items()])


def test_the_whole_method_is_never_called_one_of_its_parts():
    frozen, whole = {"reference.policy": "frozen"}, WHOLE
    called = labels(study(frozen=frozen, timestep_aware=whole, ours=frozen, mine=whole, sft=frozen))
    assert called == {
        "pretrained": "pretrained",
        "frozen": "Diffusion-DPO",
        "timestep-aware": "ours (timestep-aware)",
        "ours": "Diffusion-DPO (ours)",
        "mine": "ours (mine)",
        "sft": "Diffusion-DPO (sft)",
    }


def test_arms_of_one_method_are_told_apart():
    frozen = {"reference.policy": "frozen"}
    called = labels(
        study(
            beta_low=frozen,
            tuned_frozen=frozen,
            soft=frozen,
            threshold={"reference.policy": "threshold"},
            sampled=frozen,
        )
    )
    assert [*called.values()] == [
        "pretrained", "beta x 1/5", "Diffusion-DPO, tuned", "Diffusion-DPO (soft)", "threshold", "sampled",
    ]  # fmt: skip


def test_a_label_beyond_the_methods_holds_only_for_its_settings():
    low = {"timesteps.density": "discounted", "timesteps.gamma": "0.8", "reference.policy": "threshold"}
    assert labels(study(gamma_8=low))["gamma-8"] == "gamma 0.8"
    assert labels(study(gamma_8=low | {"timesteps.gamma": "0.7"}))["gamma-8"] == "gamma-8"
    assert labels(study(reinit={"reference.policy": "threshold"}))["reinit"] == "reinit"


def test_a_method_needs_all_of_its_parts():
    assert method(WHOLE) == "ours"
    assert method(WHOLE | {"reference.on_exceed": "reinit"}) == ""
    assert method(WHOLE | {"reference.policy": "frozen"}) == "timestep-aware only"
    assert method(WHOLE | {"reward_scale.shape": "constant", "reference.policy": "frozen"}) == ""
    assert method({"objective.loss": "kto", "reference.policy": "frozen"}) == "Diffusion-KTO"
    assert method({"objective.label": "soft", "reference.policy": "frozen"}) == ""
    assert method({"objective.safeguard": "True", "reference.policy": "frozen"}) == ""
