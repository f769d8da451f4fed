"""Draw and score what an evaluation's folder lacks; stopped at any time, it goes on where it was."""

from itertools import groupby

import numpy as np
import torch

from workbench.common.errors import Failure
from workbench.common.progress import Progress
from workbench.evaluation import model_sources, reward_models, sample_store
from workbench.evaluation.plan import Job


def complete(job: Job) -> None:
    """Draw every image and give every image every score that is not there yet.

    Raises:
        Failure: the device has no memory left, or a score is not a number.
    """
    try:
        # All images before all scores: a model that draws and a reward model are never in memory together.
        draw(job)
        score(job)
    except torch.OutOfMemoryError:
        lower = f"lower --batch-size (now {job.batch_size}) or --resolution, or draw with --dtype float16"
        raise Failure(f"out of memory: {lower}; what is done is kept, and the same command goes on") from None


def draw(job: Job) -> None:
    """Draw the images of every shard that has none, model by model."""
    sampling = job.settings["sampling"]
    missing = [shard for shard in job.shards() if "image" not in sample_store.columns(shard.path)]
    with Progress(
        total=sum(len(shard.rows) for shard in missing), desc="draw", unit="image", disable=not missing
    ) as bar:
        # Shards come model by model, as groupby needs them, so that each model is loaded once.
        for name, shards in groupby(missing, key=lambda shard: shard.model):
            bar.set_postfix_str(name)
            backend, denoiser = model_sources.open_model(job.models[name], job.device, sampling)
            for shard in shards:
                images = backend.sample(
                    denoiser,
                    shard.captions,
                    shard.noise_seeds,
                    steps=sampling["steps"],
                    guidance=sampling["guidance"],
                    batch_size=job.batch_size,
                )
                sample_store.write_images(shard, images)
                bar.update(len(images))
            del backend, denoiser  # two models at once may be more than the device holds


def score(job: Job) -> None:
    """Give every shard the scores that it lacks, reward model by reward model.

    Raises:
        Failure: a score is not a finite number; names the model and the prompt.
    """
    for name, files in job.reward_models.items():
        missing = [shard for shard in job.shards() if name not in sample_store.columns(shard.path)]
        if not missing:
            continue
        scorer = reward_models.load(name, files, job.device, job.batch_size)
        with Progress(total=sum(len(shard.rows) for shard in missing), desc=f"score {name}", unit="image") as bar:
            for shard in missing:
                values = scorer(np.stack(sample_store.read_images(shard.path)), shard.captions)
                # Before it is written: a shard that has the column would count as scored.
                if not np.isfinite(values).all():
                    prompt = shard.captions[int(np.flatnonzero(~np.isfinite(values))[0])]
                    raise Failure(f"--scorer {name}: not a finite score for {shard.model}'s image of {prompt!r}")
                sample_store.add_scores(shard, name, values)
                bar.update(len(values))
        del scorer  # as above
