"""What a policy has become: its distance from the pretrained model, and per-timestep diagnostics.

All diagnostics compare with the *pretrained* model, the one yardstick that is the same in every run; where the
reference is frozen the two are the same. Draws are fixed, so runs and steps are compared on the same noise,
and the pretrained model's side is computed once.
"""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from workbench.common import distributed
from workbench.common.cache import cached, digest
from workbench.data.pairs import EncodedPairs
from workbench.method.divergence import error_difference, kernel_kl
from workbench.method.noise import ForwardProcess, bucket_names, bucket_of, squared_error, stratified
from workbench.method.objectives import accuracy
from workbench.method.reference import Divergence
from workbench.training.loop import Denoise, noised


class Probe:
    """Fixed noised winners, stratified over t, on which divergence from the pretrained model is measured.

    Args:
        pretrained: the pretrained denoiser; used here once, not kept.
        size: number of winners, taken evenly from the data; at most as many as there are.
        batch_size: images a forward pass.
    """

    def __init__(
        self,
        denoise: Denoise,
        pretrained: nn.Module,
        pairs: EncodedPairs,
        process: ForwardProcess,
        *,
        size: int,
        device: torch.device,
        seed: int = 0,
        batch_size: int = 64,
    ):
        generator = Generator().manual_seed(seed)
        self.size = size = min(size, len(pairs))
        index = torch.randperm(len(pairs), generator=generator)[:size]
        # As many buckets as images: each has a timestep of its own interval, and the probe covers the axis evenly.
        t = stratified(torch.rand(size, 1, generator=generator), torch.arange(size), size, len(process))[:, 0]
        # Drawn for all and then divided, so that the probe does not depend on the number of processes.
        eps = torch.randn(size, *pairs.shape, generator=generator)
        mine = distributed.spread(size)
        kept = torch.device("cpu")  # long embeddings of many captions are no use on the device between measurements
        batch, process = pairs.gather(index[mine], kept), process.to(kept)
        self.t, eps, self.condition = t[mine], eps[mine], batch.condition
        self.x_t, self.target = process.x_t(batch.x_w, eps, self.t), process.target(batch.x_w, eps, self.t)
        self.denoise, self.batch_size, self.device = denoise, batch_size, device
        # Once: the pretrained model need not stay in memory, and both sides of the difference have the same noise.
        self._compare_with(self._predict(pretrained))

    def _compare_with(self, prediction: Tensor) -> None:
        self.prediction_init, self.error_init = prediction, squared_error(prediction, self.target)

    def state(self) -> Tensor:
        """The pretrained model's predictions, of all processes; a collective call."""
        return distributed.collect(self.prediction_init, self.size)

    def resumed(self, state: Tensor) -> "Probe":
        """The same probe with the predictions that `state` returned.

        Another machine would round its own otherwise, and a resumed run might decide otherwise about a candidate whose
        divergence is close to delta.
        """
        probe = copy.copy(self)
        probe._compare_with(state[distributed.spread(self.size)])
        return probe

    @torch.no_grad()
    def _predict(self, model: nn.Module) -> Tensor:
        parts = []
        for start in range(0, len(self.t), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            condition = {name: x[chunk].to(self.device) for name, x in self.condition.items()}
            x_t, t = self.x_t[chunk].to(self.device), self.t[chunk].to(self.device)
            parts.append(self.denoise(model, x_t, t, condition).float().cpu())
        return torch.cat(parts)

    def __call__(self, model: nn.Module) -> Divergence:
        """The model's mean divergence: paper's Eq. 8 and the kernel KL; the same number on every process."""
        prediction = self._predict(model)
        difference = error_difference(squared_error(prediction, self.target), self.error_init)
        kl = kernel_kl(prediction, self.prediction_init)
        every = distributed.collect(torch.stack([difference, kl], dim=1), self.size)
        # One image has no spread to estimate an error from.
        error = every[:, 0].std() / self.size**0.5 if self.size > 1 else every.new_zeros(())
        mean_difference, mean_kl = every.mean(0).tolist()
        return Divergence(mean_difference, mean_kl, error.item())


class BucketDiagnostics:
    """Denoising loss, implicit reward, margin, accuracy and divergence on fixed draws of pairs, over all and by bucket.

    The pairs are shuffled once; draw j of the i-th lies in bucket (i + j) mod buckets, so any number of first pairs
    weighs the buckets alike, and `buckets` draws see every pair in every bucket. A curve over training has the same
    pairs and noise at each of its points: the first draw of the first `curve` pairs.

    Args:
        pretrained: the pretrained denoiser; its errors on all draws are computed once and kept on disk.
        pretrained_digest: of its weights, its schedule and the precision.
        curve: pairs of the curve, at most all.
        draws: timesteps a pair in the full pass, which sees all pairs.
    """

    #: Means over the curve's pairs, as `validation/NAME`.
    MEANS = ("margin", "accuracy", "reward", "loss", "divergence")
    #: Beside them: the mean margin's standard error, and the median, which the heavy tail at low noise does not move.
    ROBUST = ("margin_error", "margin_median")
    #: The margin's mean over the curve's pairs of each bucket, as `CURVE/BUCKET`.
    CURVE = "validation_margin"
    #: What a full pass measures by bucket, as `timestep_NAME/BUCKET`.
    BY_BUCKET = ("loss", "reward", "reward_size", "margin", "accuracy", "divergence", "count")

    def __init__(
        self,
        denoise: Denoise,
        pretrained: nn.Module,
        pairs: EncodedPairs,
        process: ForwardProcess,
        *,
        pretrained_digest: str,
        buckets: int,
        curve: int,
        draws: int,
        device: torch.device,
        seed: int = 1,
        batch_size: int = 64,
    ):
        self.denoise, self.pairs, self.process, self.device = denoise, pairs, process, device
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.curve, self.draws = min(curve, len(pairs)), draws
        generator = Generator().manual_seed(seed)
        place = torch.arange(len(pairs))
        self.order = torch.randperm(len(pairs), generator=generator)
        self.t = stratified(torch.rand(len(pairs), draws, generator=generator), place, buckets, len(process))
        self.errors_init = cached(
            "diagnostics",
            # The number in the name is the computation's version: errors of an older one are not taken from the cache.
            digest("diagnostics-3", pairs.digest, pretrained_digest, buckets, draws, seed),
            lambda: {str(draw): self._errors(pretrained, draw, len(pairs)).cpu() for draw in range(draws)},
        )

    @torch.no_grad()
    def _errors(self, model: nn.Module, draw: int, count: int) -> Tensor:
        """Errors on winners and losers of the first `count` pairs, (2, count)."""
        # A generator for each draw: the curve's pairs have the same noise in a full pass, which measures all pairs.
        generator = Generator().manual_seed(self.seed * 1000 + draw + 1)
        parts = []
        # Half: each pair is two images. Times the processes, among which the pairs are spread.
        for place in torch.arange(count).split(self.batch_size // 2 * distributed.world()):
            eps = torch.randn(len(place), *self.pairs.shape, generator=generator)
            mine = distributed.spread(len(place))
            batch = self.pairs.gather(self.order[place[mine]], self.device)
            t = self.t[place[mine], draw].to(self.device)
            x_t, t, condition, target = noised(batch, t, eps[mine].to(self.device), self.process)
            errors = squared_error(self.denoise(model, x_t, t, condition), target)
            # `collect` orders along the first axis, so pairs come first for it and last in the result.
            parts.append(distributed.collect(errors.view(2, -1).T, len(place)))
        return torch.cat(parts).T

    def __call__(self, policy: nn.Module, full: bool) -> dict[str, float]:
        """Measures of the curve's pairs, `validation*`, and after a full pass `timestep_*/BUCKET`; counts are exact."""
        if not full:
            return self._curve(self._table(policy, 0, self.curve))
        tables = [self._table(policy, draw, len(self.pairs)) for draw in range(self.draws)]
        curve = self._curve({name: values[: self.curve] for name, values in tables[0].items()})
        table = {name: np.concatenate([part[name] for part in tables]) for name in tables[0]}
        metrics: dict[str, float] = {}
        for name, inside in self._buckets(table.pop("bucket")):
            means = {quantity: float(values[inside].mean()) for quantity, values in table.items()}
            means["count"] = int(inside.sum())
            metrics |= {f"timestep_{quantity}/{name}": value for quantity, value in means.items()}
        return metrics | curve

    def _curve(self, table: dict[str, NDArray]) -> dict[str, float]:
        margin = table["margin"]
        by_bucket = {name: margin[inside] for name, inside in self._buckets(table["bucket"])}
        metrics = {f"validation/{name}": float(table[name].mean()) for name in self.MEANS}
        # Of a stratified mean: what differs between buckets is no error of it.
        within = [part.var(ddof=1) * len(part) for part in by_bucket.values() if len(part) > 1]
        metrics["validation/margin_error"] = float(np.sqrt(np.sum(within)) / len(margin))
        metrics["validation/margin_median"] = float(np.median(margin))
        return metrics | {f"{self.CURVE}/{name}": float(part.mean()) for name, part in by_bucket.items()}

    def _buckets(self, bucket: NDArray) -> list[tuple[str, NDArray[np.bool_]]]:
        """Names of the buckets in which draws lie, and which draws these are, (count,) each."""
        names = enumerate(bucket_names(self.buckets, len(self.process)))
        return [(name, bucket == place) for place, name in names if (bucket == place).any()]

    def _table(self, policy: nn.Module, draw: int, count: int) -> dict[str, NDArray]:
        """Each quantity of the first `count` pairs at one of their draws, float64, (count,), and the draws' buckets."""
        policy_w, policy_l = self._errors(policy, draw, count).cpu()
        init_w, init_l = self.errors_init[str(draw)][:, :count]
        reward_w, reward_l = init_w - policy_w, init_l - policy_l
        margin = reward_w - reward_l
        values = {
            "loss": (policy_w + policy_l) / 2,
            "reward": (reward_w + reward_l) / 2,
            "reward_size": (reward_w.abs() + reward_l.abs()) / 2,
            "margin": margin,
            "accuracy": accuracy(margin),
            "divergence": error_difference(policy_w, init_w),
        }
        columns = {name: value.double().numpy() for name, value in values.items()}
        return columns | {"bucket": bucket_of(self.t[:count, draw], self.buckets, len(self.process)).numpy()}


def bucket_means(lam: Tensor, buckets: int) -> dict[str, float]:
    """`timestep_lambda/BUCKET`: the mean of lambda(t), (T,), over each bucket."""
    bucket = bucket_of(torch.arange(len(lam)), buckets, len(lam))
    names = bucket_names(buckets, len(lam))
    return {f"timestep_lambda/{name}": lam[bucket == i].mean().item() for i, name in enumerate(names)}
