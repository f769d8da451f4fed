"""The checks behind the claims that need no arms: Theorem 1, and how divergence is measured; one tracked run a seed.

Symbols: D = divergence of Eq. 8; a candidate is the policy at an update's step.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from workbench import tracking
from workbench.analysis.claims.theory import gaussian_divergences, margin_gradients
from workbench.common.errors import UserError
from workbench.common.progress import Progress
from workbench.method.noise import squared_error
from workbench.studies.experiment import Experiment
from workbench.tracking import reconcile, study_runs, tags
from workbench.tracking.study_runs import StudyId
from workbench.training.build import build
from workbench.training.config import Config, defaults_beside
from workbench.training.preparation import Prepared, prepare
from workbench.training.provenance import describe, provenance

POOL = 1024  # noised winners on which both estimators draw
PASSES = 64  # forward passes that a measurement may cost
REPEATS = 1000
FIRST, SECOND = 16, 24  # steps of the two candidates


def run_checks(experiment: Experiment, study: StudyId) -> None:
    """Run the checks with every seed of the experiment's sweep, as runs of a study; finished seeds are kept.

    Raises:
        UserError: a finished seed was run with other settings.
    """
    client = tracking.connect()
    # Before runs are looked up: those of earlier versions have no token, by which a study's runs are found.
    reconcile.adopt(client, study, {})
    done, missing = reconcile.complete_runs(client, study), {}
    for seed in experiment.sweep.seeds or (experiment.config.seed,):
        own = _config(experiment, seed)
        if f"seed-{seed}" not in done:
            missing[seed] = own
            continue
        # A setting that came after the run was made has its default there, which changes nothing.
        was = defaults_beside(own.flat()) | done[f"seed-{seed}"]
        for name, value in own.flat().items():
            if str(was.get(name)) != str(value):
                raise UserError(
                    f"study {study.name!r} was made with {name} = {was.get(name)}, now it is {value}; choose another "
                    "--study name or restore the settings"
                )
    if not missing:
        return
    note = "Checks of the claims that need no arms."
    parent, state = study_runs.open_study(client, study, note), "failed"
    try:
        for seed, own in Progress(desc=study.name, iterable=missing.items(), unit="seed"):
            _run_check(client, own, seed, study, parent)
        state = "complete"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        study_runs.finish_study(client, parent, {}, note, state)


def _config(experiment: Experiment, seed: int) -> Config:
    """The configuration of an unregularised run of just enough steps, measured as cheaply as can be."""
    changes = {"seed": seed, "reference.policy": "update", "train.steps": SECOND}
    changes |= {"evaluation.seeds": 0, "evaluation.grid": 0, "diagnostics.draws": 1}
    return experiment.run_config(changes)


def _run_check(client: Any, config: Config, seed: int, study: StudyId, parent: str) -> None:
    about = {tags.KIND: "check", tags.STUDY: study.name, tags.TOKEN: study.token, tags.ARM: "check"}
    about |= provenance() | {tags.NOTE: describe(config)}
    tracker = tracking.Tracker(client, f"seed-{seed}", params=config.flat(), tags=about, parent=parent)
    state = "interrupted"
    try:
        prepared = prepare(config)
        tracker.log(0, theory_checks(seed, prepared.backend.process.abar) | estimator_checks(config, prepared))
        state = "complete"
    finally:
        tracker.close(state)


def theory_checks(seed: int, abar: Tensor) -> dict[str, float]:
    """Theorem 1 on small models, and both forms of the divergence where the optimal denoiser is known.

    Args:
        abar: the schedule, (T,).
    """
    found = margin_gradients(seed)
    slope = np.polyfit(found.scales.log().numpy(), found.squared.log().numpy(), 1)[0]
    optimal, other = (gaussian_divergences(seed, abar, optimal=good) for good in (True, False))
    return {
        "check/softmax_over_bound": found.softmax.max().item() / found.bound,
        "check/squared_slope": float(slope),
        "check/optimal_eq8": optimal.error_difference,
        "check/optimal_kl": optimal.kernel_kl,
        "check/suboptimal_eq8": other.error_difference,
        "check/suboptimal_kl": other.kernel_kl,
    }


def estimator_checks(config: Config, prepared: Prepared) -> dict[str, float]:
    """Variance of D by a fixed probe against a fresh subset of each batch, both at PASSES passes a measurement.

    The policy trains to two candidates; errors of a pool of noised winners stand for the population. A fixed probe is
    drawn once, stratified over t, and measures both candidates at one pass an image, the pretrained model's errors
    being known; the batch subset is drawn anew for each and needs the candidate's and the pretrained model's pass, so
    it holds half as many images. The change, D of the second minus D of the first, is what a curve over training shows;
    the level is what the threshold is compared with, and its variance is over the choice of the probe, an error that
    a fixed one carries through the run.
    """
    pool = _Pool(prepared, config.seed)
    init, errors = pool.errors(prepared.backend.denoiser()), []
    training = build(config, prepared.backend, prepared.train, prepared.probe)
    for record in training.records:
        if record.step in (FIRST, SECOND):
            errors.append(pool.errors(training.policy) - init)
    first, second = errors
    rng = np.random.default_rng(config.seed)
    # Parts of equal size along t; a fixed probe has one image of each.
    strata = np.array_split(np.argsort(pool.t.numpy(), kind="stable"), PASSES)
    fixed = np.stack([rng.choice(stratum, REPEATS) for stratum in strata], axis=1)
    # Half as many images: the pretrained model's errors are not known beforehand, and cost a pass too.
    fresh, again = (rng.integers(POOL, size=(REPEATS, PASSES // 2)) for _ in range(2))
    change_fixed = second[fixed].mean(1) - first[fixed].mean(1)
    change_fresh = second[again].mean(1) - first[fresh].mean(1)
    return {
        "check/change_variance_ratio": float(change_fixed.var() / change_fresh.var()),
        "check/level_variance_ratio": float(second[fixed].mean(1).var() / second[again].mean(1).var()),
        "check/divergence_first": float(first.mean()),
        "check/divergence_second": float(second.mean()),
    }


class _Pool:
    """Noised winners at timesteps drawn evenly."""

    def __init__(self, ready: Prepared, seed: int):
        # Another seed than training's, so that the pool does not hold its noise.
        generator = Generator().manual_seed(seed + 10_000)
        self.ready, self.pairs = ready, ready.train.sample(POOL)
        self.index = torch.randint(len(self.pairs), (POOL,), generator=generator)
        self.t = torch.randint(ready.backend.timesteps, (POOL,), generator=generator)
        self.eps = torch.randn(POOL, *self.pairs.shape, generator=generator)

    @torch.no_grad()
    def errors(self, model: nn.Module) -> NDArray[np.float64]:
        """A model's squared error on each of the pool's winners, mean over elements, (POOL,)."""
        backend, parts = self.ready.backend, []
        device, process = backend.device, backend.process.to(backend.device)
        for place in torch.arange(POOL).split(64):
            batch = self.pairs.gather(self.index[place], device)
            t, eps = self.t[place].to(device), self.eps[place].to(device)
            predicted = backend.denoise(model, process.x_t(batch.x_w, eps, t), t, batch.condition)
            parts.append(squared_error(predicted, process.target(batch.x_w, eps, t)).cpu())
        return torch.cat(parts).double().numpy()
