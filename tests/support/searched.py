"""Studies with invented trials, as the workbench would have made them."""

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

SPACE = {
    "train.lr": {"type": "FloatDistribution", "low": 1e-5, "high": 1e-4, "log": True},
    "timesteps.density": {"type": "CategoricalDistribution", "choices": ["uniform", "discounted"]},
    "timesteps.gamma": {"type": "FloatDistribution", "low": 0.8, "high": 0.98},
}
DISTRIBUTIONS = {
    "train.lr": FloatDistribution(1e-5, 1e-4, log=True),
    "timesteps.density": CategoricalDistribution(["uniform", "discounted"]),
    "timesteps.gamma": FloatDistribution(0.8, 0.98),
}
BOTH = {"sweep.objective": ["eval/reward", "divergence/policy"], "sweep.direction": ["maximize", "minimize"]}
REWARD = {"sweep.objective": "eval/reward", "sweep.direction": "maximize"}


def study(definition, trials, storage=None, name="s"):
    """A study with this definition and these trials, each made by `trial`."""
    directions = definition["sweep.direction"]
    made = optuna.create_study(
        directions=[directions] if isinstance(directions, str) else directions, storage=storage, study_name=name
    )
    made.set_user_attr("definition", {"sweep.space": SPACE} | definition)
    made.add_trials(trials)
    return made


def trial(
    *values, state="COMPLETE", beyond=None, arm=None, overrides=None, lr=3e-5, density="uniform", gamma=None, **a
):
    """A trial that came to these values.

    Args:
        beyond: how far it is beyond the bound on divergence/policy; None = there is no bound.
    """
    params = {"train.lr": lr, "timesteps.density": density} | ({} if gamma is None else {"timesteps.gamma": gamma})
    about = {"arm": arm, "name": arm, "overrides": overrides or {}} if arm else {}
    return create_trial(
        state=TrialState[state],
        values=values or None,
        params=params,
        distributions={key: DISTRIBUTIONS[key] for key in params},
        user_attrs=about | a,
        system_attrs={} if beyond is None else {"constraints:divergence/policy": beyond},
    )


def grown(definition, count, reward, seed=0, **options):
    """A study of random trials, with a reward and a divergence as functions of (lr / 1e-5, gamma or 0)."""
    import numpy as np

    rng, trials = np.random.default_rng(seed), []
    for _ in range(count):
        lr, density = 10 ** rng.uniform(-5, -4), ("uniform", "discounted")[rng.integers(2)]
        gamma = rng.uniform(0.8, 0.98) if density == "discounted" else None
        found = reward(lr / 1e-5, gamma or 0.0, rng)
        values = (found, lr * 500) if isinstance(definition["sweep.objective"], list) else (found,)
        beyond = lr * 500 - 0.02 if "sweep.constraints" in definition else None
        told = {"eval/reward": found, "divergence/policy": lr * 500}
        trials.append(trial(*values, lr=lr, density=density, gamma=gamma, beyond=beyond, **told))
    return study(definition, trials, **options)
