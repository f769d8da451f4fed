"""A training run timed on random weights and random data: what a machine makes of the real loop.

The models, the optimizer and the loop are those of `training.build`; only weights, latents and embeddings are random.
"""

import gc
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from workbench.benchmarks.timing import seconds
from workbench.data.pairs import EncodedPairs
from workbench.method.noise import ForwardProcess
from workbench.method.reference import Divergence, Reference, Rule
from workbench.models import Backend, Shape, random_backend
from workbench.training.build import Training, build
from workbench.training.config import Config, resolve
from workbench.training.diagnostics import Probe
from workbench.training.loop import StepRecord, as_floats, pair_errors

WARM = 5  # steps that are not timed: kernels are chosen, memory is taken
PAIRS = 64  # random pairs, used again and again


@dataclass(frozen=True)
class Measured:
    """What one run showed; where it did not come to its end, `problem` says why and the rest is 0.

    Attributes:
        seconds: of a step, per pair: the median of groups of steps between which the device is waited for, as a run
            waits for it.
        memory: peak on the device, bytes; 0 on a CPU.
        steps: done, all of them finite.
        updates: of the reference among them.
        exact_zero: whether every logit was exactly 0 after a hard copy, and none before.
    """

    seconds: float = 0.0
    memory: int = 0
    steps: int = 0
    updates: int = 0
    exact_zero: bool = False
    problem: str = ""


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of many: what this machine can reach."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = [seconds(lambda: torch.matmul(a, b), device) for _ in range(30 if device.type == "cuda" else 5)]
    # A product of square matrices has size^3 multiplications and as many additions. The first two calls choose kernels.
    return 2 * size**3 / min(times[2:])


def random_pairs(shape: Shape, backend: Backend, count: int = PAIRS) -> EncodedPairs:
    """Latents and embeddings of unit variance, float16, each pair with its own caption."""
    g = Generator().manual_seed(0)
    latents, edge = (count, *backend.latent_shape), backend.resolution
    shard: dict[str, Tensor] = {name: torch.randn(latents, generator=g).half() for name in ("x_w", "x_l")}
    shard["caption"] = torch.arange(count)
    for name, size in shape.condition.items():
        if name == "time_ids":  # sizes in pixels, and no crop
            shard[f"pair.{name}"] = torch.tensor([edge, edge, 0, 0, edge, edge]).expand(count, 6)
        elif name.endswith("mask"):  # captions as long as can be: what a shape costs at most
            shard[f"text.{name}"] = torch.ones(count, *size)
        else:
            shard[f"text.{name}"] = torch.randn(count, *size, generator=g).half()
    return EncodedPairs([shard], {"used": count}, "random")


def measure(settings: Mapping[str, Any], shape: Shape, *, steps: int, device: torch.device) -> Measured:
    """Train for some steps as an experiment's resolved settings say, and copy the policy into the reference.

    The reference follows the policy after one step more, whatever its divergence: so rarely does it move in a run of
    a real model that its time, of a forward pass over the probe, is no part of a step's. Running out of memory or of
    finite numbers is a result too.

    Args:
        settings: dotted; of its batch one forward pass is a step here.
        steps: timed ones, after WARM others.
    """
    config = resolve(
        {name: value for name, value in settings.items() if not name.startswith(("reference.", "sweep."))}
        | {"train.steps": WARM + steps + 1, "train.accumulation": 1, "train.warmup": 0, "model.resolution": 0}
        # Its empty caption would have to be encoded, and there are no text encoders.
        | {"data.caption_dropout": 0}
        | {"reference.policy": "update", "reference.interval": WARM + steps + 1}
        | dict.fromkeys(("diagnostics.probe", "diagnostics.batch_size"), 2 * settings["train.batch_size"])
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return _measure(config, shape, device)
    except torch.OutOfMemoryError:
        problem = f"out of memory at {config.train.batch_size} pairs a pass"
    except FloatingPointError as error:
        problem = str(error)
    finally:
        free(device)
    return Measured(problem=problem)


def free(device: torch.device) -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def build_on(config: Config, backend: Backend, pairs: EncodedPairs) -> Training:
    """A run that is ready to train on these pairs, with a probe out of them."""
    settings = config.diagnostics
    probe = Probe(
        backend.denoise,
        backend.denoiser(half=True),
        pairs,
        backend.process.to(backend.device),
        size=settings.probe,
        device=backend.device,
        batch_size=settings.batch_size,
    )
    return build(config, backend, pairs, probe)


def _measure(config: Config, shape: Shape, device: torch.device) -> Measured:
    backend = random_backend(shape, device, getattr(torch, config.model.dtype))
    size, process = config.train.batch_size, backend.process.to(device)
    pairs = random_pairs(shape, backend, max(PAIRS, size))
    training = build_on(config, backend, pairs)
    done: list[StepRecord] = []

    def take(count: int) -> None:
        done.extend(itertools.islice(training.records, count))

    take(WARM)
    timed = config.train.steps - WARM - 1
    # A device is given work ahead of time until a run looks at its numbers; waiting for every step would be slower.
    groups = [min(training.check_every, timed - start) for start in range(0, timed, training.check_every)]
    times = [seconds(lambda count=count: take(count), device) / count for count in groups]  # type: ignore[misc]
    take(1)
    as_floats(done[-1:])
    # Before the test of the logits, which takes memory of its own.
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    exact = _exact_zero(training, backend, pairs, process, device, size)
    return Measured(statistics.median(times) / size, memory, config.train.steps, training.reference.updates, exact)


def _exact_zero(
    training: Training, backend: Backend, pairs: EncodedPairs, process: ForwardProcess, device: torch.device, size: int
) -> bool:
    """Move every weight of the policy, norms included, copy it into the reference, and look at the logits.

    At initial weights the test would be too easy: norms that are exactly 1 and 0 are exact in any precision. The policy
    keeps its graph, as in training: other kernels may be chosen without.
    """
    g = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in training.policy.parameters():
            # So much that it shows in half precision: norms are about 1, and an adapter's second factor about 0.
            scale = 1.0 if parameter.ndim < 2 else max(0.1, float(parameter.float().std(correction=0)))
            parameter.add_(torch.randn(parameter.shape, generator=g, device=device), alpha=0.01 * scale)
    batch = pairs.gather(torch.arange(size), device)
    t = torch.linspace(1, backend.timesteps - 1, size, device=device).long()
    eps = torch.randn(batch.x_w.shape, generator=g, device=device)
    reference = Reference(training.reference.model, Rule(interval=1), lambda model: Divergence(0.0, 0.0), dict)

    def margin() -> Tensor:
        return pair_errors(backend.denoise, training.policy, reference.model, batch, t, eps, process).margin.detach()

    before = margin()
    reference.after_step(1, training.policy)
    return bool((before != 0).any() and (margin() == 0).all())
