"""From an experiment's settings to the plan of its run on many GPUs, and that as a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.benchmarks import costs
from workbench.benchmarks.plan import Cluster, Gpu, Work, optimizer_seconds, plan, reached
from workbench.common.errors import UserError
from workbench.common.markdown import markdown_table, two_digits
from workbench.models import SHAPES, random_backend
from workbench.training.build import require_shardable
from workbench.training.config import resolve
from workbench.training.measurements import logged_values

NOTE = (
    "By formulas (workbench/benchmarks/plan.py), not measured. Memory is without activations. Encoding and decoding "
    "are of Pick-a-Pic v2, by one GPU and 16 cores, before training. A limit is reached at 1; in brackets: with how "
    "many GPUs, were they doubled and the step left as it is."
)


@dataclass(frozen=True)
class Measured:
    """A measurement of `--measure` that a plan may begin with.

    Attributes:
        seconds: a pair, of steps of one pass each, the optimizer's moves included.
        batch: pairs of a pass.
        device: its name.
        compiled, checkpointing: "yes" or "no".
    """

    seconds: float
    batch: int
    device: str
    compiled: str
    checkpointing: str

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.batch} pairs a pass, compile: {self.compiled}, checkpointing: {self.checkpointing}"
        )

    def arithmetic(self, trained: int, gpu: Gpu) -> float:
        """Seconds a pair without the optimizer's moves, which a plan counts once a step and not once a pass."""
        return self.seconds - optimizer_seconds(trained, gpu) / self.batch


def work_of(
    shape: str,
    settings: Mapping[str, Any],
    utilisation: float,
    batch_size: int | None,
    cluster: Cluster,
    measured: Measured | None = None,
) -> Work:
    """The run of an experiment's settings, written for one GPU, with the pairs of a step spread over a cluster's GPUs.

    Args:
        shape: name in SHAPES, of a family in `costs.TEXT_ENCODERS`.
        settings: dotted and resolved.
        utilisation: share of the peak rate.
        batch_size: pairs a GPU and pass; None = as the settings say, or fewer where a step has no more.
        measured: on a GPU of the cluster's kind; None = from FLOPs and utilisation.
    Raises:
        UserError: the plan does not know this shape or resolution, the settings do not work sharded, the GPUs cannot
            share a step's pairs, or the measurement is shorter than the optimizer alone.
    """
    if SHAPES[shape].family not in costs.TEXT_ENCODERS or shape == "tiny":
        raise UserError(f"--shape {shape}: --plan knows the encoders of {', '.join(costs.TEXT_ENCODERS)} alone")
    config, gpus = resolve(settings), cluster.gpus
    edge = random_backend(SHAPES[shape], torch.device("meta")).resolution
    if config.model.resolution not in (0, edge):
        raise UserError(f"model.resolution = {config.model.resolution}: --plan counts {shape} at {edge} pixels alone")
    sharded = config.train.parallel == "fsdp" and gpus > 1
    if sharded:
        require_shardable(config)
    cost, pairs = costs.count(SHAPES[shape], config.lora.rank), config.train.batch_size * config.train.accumulation
    if gpus > pairs:
        raise UserError(f"--gpus {gpus}: a step has {pairs} pairs, at least one for each GPU is needed")
    batch = min(batch_size or config.train.batch_size, pairs // gpus)
    if pairs % (batch * gpus):
        raise UserError(
            f"--gpus {gpus}: a step has {pairs} pairs, which passes of {batch} pairs on each GPU do not come to; "
            "expected numbers of GPUs and of pairs (--batch-size) that divide them"
        )
    if measured and measured.arithmetic(cost.trained, cluster.gpu) <= 0:
        raise UserError(f"--measured: {1e3 * measured.seconds:.3g} ms a pair is less than the optimizer alone takes")
    images, caption = costs.encoder_flops(SHAPES[shape])
    of_pair, of_caption = costs.store_bytes(SHAPES[shape], config.data.dtype)
    return Work(
        cost=cost,
        flops=cost.recomputed if config.train.checkpointing else cost.step,
        precision=config.model.dtype,
        utilisation=utilisation,
        optimizer=config.train.optimizer,
        sharded=sharded,
        batch=batch,
        pairs=pairs,
        steps=config.train.steps,
        encode_images=images,
        encode_caption=caption,
        pixels=edge**2,
        pair_bytes=of_pair,
        caption_bytes=of_caption,
        rows=logged_values(config),
        seconds_pair=measured.arithmetic(cost.trained, cluster.gpu) if measured else 0.0,
        encoded_ways=2 if config.data.flip else 1,
        # Mirrored alike: two rows a pair; independently: also the two of one mirrored image each.
        stored_ways={False: 1, True: 2, "independent": 4}[config.data.flip],
        **costs.copies_of(config),
    )


def last_measured(file: Path, shape: str, variant: str, gpu: str) -> Measured:
    """The last measurement of this shape and variant, on this kind of GPU, that came to its end.

    Args:
        file: a measured.json of `--measure`.
        gpu: key of `plan.GPUS`, which is part of the device's own name.
    Raises:
        UserError: the file is another, or holds no such measurement.
    """
    try:
        rows = [
            Measured(
                float(row["measured"]["seconds"]),
                int(row["batch"]),
                str(row["device"]),
                str(row["compile"]),
                str(row["checkpointing"]),
            )
            for row in json.loads(file.read_text("utf-8"))
            if (row["shape"], row["variant"]) == (shape, variant) and not row["problem"]
        ]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--measured {file}: not a measured.json that --measure has written") from None
    if not rows:
        raise UserError(f"--measured {file}: holds no measurement of {shape} {variant} that came to its end")
    fitting = [row for row in rows if gpu in row.device]
    if not fitting:
        raise UserError(
            f"--measured {file}: {shape} {variant} was measured on {rows[-1].device}, the plan is of {gpu}s"
        )
    return fitting[-1]


def shown(work: Work, cluster: Cluster, measured: Measured | None = None) -> dict[str, Any]:
    """A plan's lines in words, by what they are of, and under "plan" its numbers as they are.

    Args:
        measured: what the work's seconds a pair come from, for a line that says so.
    """
    found, places = plan(work, cluster), reached(work, cluster)
    limits = {
        f"limit: {name}": f"{two_digits(load)} ({f'{places[name]} GPUs' if places[name] else 'not reached'})"
        for name, load in found.loads.items()
    }
    return {
        "parallel": "fsdp" if work.sharded else "ddp",
        "precision": work.precision,
        "pairs a pass x passes x GPUs": f"{work.batch} x {found.accumulation} x {cluster.gpus}",
        "step, communication not hidden, s": two_digits(found.step),
        "of it arithmetic, s": two_digits(found.arithmetic),
        **({"arithmetic measured on": str(measured)} if measured else {}),
        "of it clipping and optimizer, s": two_digits(found.optimizer),
        "of it communication, s": two_digits(found.communication),
        "communication that can be hidden, s": two_digits(found.hidden),
        "sent by each GPU in a step, GB": two_digits(found.sent / 1e9),
        "training, hours": two_digits(found.training / 3600),
        "weights, gradients, optimizer of a GPU, GB": two_digits(found.memory / 1e9),
        "encoding on one GPU, pairs a second": two_digits(found.encoded),
        "encoding on one GPU, hours": two_digits(found.encoding / 3600),
        "decoding images meanwhile, hours": two_digits(found.decoding / 3600),
        "encoded store, GB": two_digits(found.stored / 1e9),
        "read from it, MB a second": two_digits(found.read / found.step / 1e6),
        "metric values of the run": f"{work.rows:,}",
        **limits,
        "plan": asdict(found),
    }


def table(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """Plans side by side: a line for each quantity and limit, a column for each plan."""
    names = dict.fromkeys(name for one in plans.values() for name in one if name != "plan")
    return markdown_table(["", *plans], [[name, *(one.get(name) for one in plans.values())] for name in names])
