"""From an experiment's settings to the plan of its run on many GPUs, and that as a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workbench.benchmarks import costs
from workbench.benchmarks.plan import Cluster, Work, plan, reached
from workbench.common.errors import UserError
from workbench.common.markdown import markdown_table, two_digits
from workbench.models import SHAPES
from workbench.training.build import require_shardable
from workbench.training.config import resolve
from workbench.training.measurements import logged_values

NOTE = (
    "By formulas (workbench/benchmarks/plan.py), not measured. Memory is without activations. Encoding and decoding "
    "are of Pick-a-Pic v2, by one GPU and 16 cores, before training. A limit is reached at 1; in brackets: with how "
    "many GPUs, were they doubled and the step left as it is."
)


def work_of(
    shape: str, settings: Mapping[str, Any], utilisation: float, batch_size: int | None, gpus: int, seconds: float = 0.0
) -> Work:
    """The run of an experiment's settings, written for one GPU, with the pairs of a step spread over so many GPUs.

    Args:
        shape: name in SHAPES, of a family in `costs.TEXT_ENCODERS`.
        settings: dotted and resolved.
        utilisation: share of the peak rate.
        batch_size: pairs a GPU and pass; None = as the settings say, or fewer where a step has no more.
        seconds: a pair, measured; 0 = from FLOPs and utilisation.
    Raises:
        UserError: the encoders of this shape are not known, or the settings do not work sharded.
    """
    if SHAPES[shape].family not in costs.TEXT_ENCODERS:
        raise UserError(f"--shape {shape}: --plan knows the encoders of {', '.join(costs.TEXT_ENCODERS)} alone")
    config = resolve(settings)
    sharded = config.train.parallel == "fsdp" and gpus > 1
    if sharded:
        require_shardable(config)
    cost, pairs = costs.count(SHAPES[shape], config.lora.rank), config.train.batch_size * config.train.accumulation
    if gpus > pairs:
        raise UserError(f"--gpus {gpus}: a step has {pairs} pairs, at least one for each GPU is needed")
    images, caption = costs.encoder_flops(SHAPES[shape])
    of_pair, of_caption = costs.store_bytes(SHAPES[shape], config.data.dtype)
    return Work(
        cost=cost,
        flops=cost.recomputed if config.train.checkpointing else cost.step,
        precision=config.model.dtype,
        utilisation=utilisation,
        optimizer=config.train.optimizer,
        sharded=sharded,
        batch=min(batch_size or config.train.batch_size, pairs // gpus),
        pairs=pairs,
        steps=config.train.steps,
        encode_images=images,
        encode_caption=caption,
        pixels=config.model.resolution**2,
        pair_bytes=of_pair,
        caption_bytes=of_caption,
        rows=logged_values(config),
        seconds_pair=seconds,
    )


def measured_seconds(file: Path, shape: str, variant: str) -> float:
    """Seconds a pair of the last measurement of this shape and variant that came to its end.

    Args:
        file: a measured.json of `--measure`.
    Raises:
        UserError: the file is another, or holds no such measurement.
    """
    try:
        times = [
            float(row["measured"]["seconds"])
            for row in json.loads(file.read_text("utf-8"))
            if (row["shape"], row["variant"]) == (shape, variant) and not row["problem"]
        ]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--measured {file}: not a measured.json that --measure has written") from None
    if not times:
        raise UserError(f"--measured {file}: holds no measurement of {shape} {variant} that came to its end")
    return times[-1]


def shown(work: Work, cluster: Cluster) -> dict[str, Any]:
    """A plan's lines in words, by what they are of, and under "plan" its numbers as they are."""
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
    return markdown_table(["", *plans], [[name, *(one[name] for one in plans.values())] for name in names])
