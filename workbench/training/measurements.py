"""What a run measures, and when. The metrics' names are declared by those who measure them; here they come together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from workbench.method.noise import bucket_names
from workbench.method.reference import Divergence
from workbench.training.build import Training
from workbench.training.config import Config
from workbench.training.diagnostics import BucketDiagnostics, bucket_means
from workbench.training.loop import STEP_METRICS, StepRecord
from workbench.training.preparation import Prepared, open_backend
from workbench.training.preview import Preview
from workbench.training.samples import COMPARED, PROGRESS, Samples, compare

UPDATES, FROZEN = "reference/updates", "reference/frozen"
UNSEEN = "divergence/reference_unseen"


@dataclass(frozen=True)
class Measured:
    """What was measured after a step.

    Attributes:
        grid: the sample grid, where one was drawn, (H, W, 3) uint8.
        waited: whether measuring has waited for the device anyway.
    """

    metrics: dict[str, float]
    grid: NDArray[Any] | None = None
    waited: bool = False


@dataclass(frozen=True)
class Drawn:
    """The evaluated samples at the end of a run, and what they show.

    Attributes:
        images: (N, H, W, 3) uint8, in the order of the plan.
        grid: None where the run draws none.
        table: scores by columns, a row an image.
    """

    metrics: dict[str, float]
    images: NDArray[Any]
    pretrained: NDArray[Any]
    grid: NDArray[Any] | None
    table: Mapping[str, Any]


class Measurements:
    """Measures one run: after every step, at every diagnostics pass, and at its end."""

    def __init__(self, config: Config, prepared: Prepared, training: Training):
        self.config, self.prepared, self.training = config, prepared, training
        self.preview = Preview(prepared.sampling)

    def start(self) -> NDArray[Any] | None:
        """The pretrained model's sample grid, cut from its samples; None where there are none."""
        images = self.prepared.sampling.pretrained
        return self.preview.cut(images) if self.preview.rows and images is not None else None

    def step(self, record: StepRecord) -> Measured:
        """What is measured after a step, the last one included."""
        config, training = self.config, self.training
        rule, decision = training.reference.rule, record.decision
        metrics, final = self._reference_state(), record.step == config.train.steps
        if decision is not None and rule.rate == 1:  # the candidate was the policy itself
            metrics |= _distance("policy", Divergence(decision.divergence, decision.kernel_kl))
        # A frozen reference is the pretrained model, whose divergence is 0.
        if final and rule.interval:
            metrics[UNSEEN] = self.prepared.unseen(training.reference.model).error_difference
        if not has_pass(config, record.step):
            # A decision needs the divergence's number, for which the device was waited for.
            return Measured(metrics, waited=decision is not None)
        # Not twice: a pass over the probe costs as much as a few steps.
        if "divergence/policy" not in metrics:
            metrics |= _distance("policy", training.probe(training.policy))
        if final:
            metrics |= bucket_means(training.lam, config.diagnostics.buckets)
        metrics |= self.prepared.diagnostics(training.policy, full=final)
        grid = None
        if self.preview.rows and not (final and config.evaluation.seeds):  # else it is cut from the evaluated samples
            grid, progress = self.preview.draw(training.policy)
            metrics |= progress
        return Measured(metrics, grid, waited=True)

    def end(self, on_share: Callable[[float], object] = lambda share: None) -> Drawn | None:
        """Draw and score the trained model's samples; None where the run has no such evaluation.

        Args:
            on_share: called while they are drawn with the share that is done, 0 to 1.
        """
        sampling = self.prepared.sampling
        if sampling.scorer is None or sampling.baseline is None:
            return None
        images = sampling.draw_plan(self.training.policy, on_share)
        ours = sampling.scorer(images, range(len(images)))
        metrics, grid = compare(ours, sampling.baseline), None
        if self.preview.rows:
            # The last point of the curve, from the same prompts and seeds as its others.
            metrics |= self.preview.progress(ours)
            grid = self.preview.cut(images)
        return Drawn(metrics, images, sampling.baseline.images, grid, _scores(ours, sampling.baseline))

    def _reference_state(self) -> dict[str, float]:
        """Divergence, number of updates and whether the reference is frozen, as last measured."""
        reference = self.training.reference
        counts = {UPDATES: float(reference.updates), FROZEN: float(reference.frozen)}
        return _distance("reference", reference.divergence) | counts


def has_pass(config: Config, step: int) -> bool:
    """Whether a diagnostics pass follows a step; one always follows the last."""
    return step % config.diagnostics.interval == 0 or step == config.train.steps


def _distance(model: str, divergence: Divergence) -> dict[str, float]:
    return {f"divergence/{model}": divergence.error_difference, f"kl/{model}": divergence.kernel_kl}


def _scores(ours: Samples, baseline: Samples) -> dict[str, Any]:
    return {
        "caption": ours.captions,
        "seed": ours.seeds,
        "reward": ours.rewards.tolist(),
        "pretrained_reward": baseline.rewards.tolist(),
        "judge": ours.judged.tolist(),
        "pretrained_judge": baseline.judged.tolist(),
        **{part: values.tolist() for part, values in ours.parts.items()},
    }


def metric_names(config: Config) -> set[str]:
    """Every metric that a finished run of these settings has logged."""
    rule, rule_settings = config.chosen("reference")
    buckets = bucket_names(config.diagnostics.buckets, open_backend(config.model).timesteps)
    quantities = (*BucketDiagnostics.BY_BUCKET, "lambda")
    names: list[Iterable[str]] = [
        STEP_METRICS,
        (UPDATES, FROZEN),
        *(_distance(model, Divergence(0.0, 0.0)) for model in ("policy", "reference")),
        (UNSEEN,) if rule(**rule_settings).interval else (),
        (f"validation/{name}" for name in (*BucketDiagnostics.MEANS, *BucketDiagnostics.ROBUST)),
        (f"{BucketDiagnostics.CURVE}/{bucket}" for bucket in buckets[: config.diagnostics.pairs]),
        (f"timestep_{quantity}/{bucket}" for quantity in quantities for bucket in buckets),
        (f"eval/{name}" for name in COMPARED) if config.evaluation.seeds else (),
        (f"samples/{name}" for name in PROGRESS) if config.evaluation.seeds and config.evaluation.grid else (),
    ]
    return {name for group in names for name in group}


def logged_values(config: Config) -> int:
    """How many metric values a finished run of these settings logs at most; known without a checkpoint."""
    rule, rule_settings = config.chosen("reference")
    diagnostics, steps, interval = config.diagnostics, config.train.steps, rule(**rule_settings).interval
    evaluated, distance = bool(config.evaluation.seeds), len(_distance("", Divergence(0.0, 0.0)))
    each_step = len(STEP_METRICS) + distance + len((UPDATES, FROZEN))
    each_pass = distance + len(BucketDiagnostics.MEANS) + len(BucketDiagnostics.ROBUST)
    each_pass += min(diagnostics.buckets, diagnostics.pairs)
    each_pass += len(PROGRESS) if evaluated and config.evaluation.grid else 0
    # A decision about the reference measures the policy's distance too, where no pass has done so.
    decided = distance * (steps // interval) if interval else 0
    at_end = (len(BucketDiagnostics.BY_BUCKET) + 1) * diagnostics.buckets + bool(interval)
    at_end += len(COMPARED) if evaluated else 0
    return steps * each_step + -(-steps // diagnostics.interval) * each_pass + decided + at_end
