"""Draw and score what an evaluation's folder lacks; stopped at any time, it goes on where it was."""

from itertools import groupby

from workbench.common.progress import Progress
from workbench.evaluation import model_sources, sample_store
from workbench.evaluation.plan import Job
from workbench.evaluation.scoring import TOTAL, memory_of_samples, scored


def complete(job: Job) -> None:
    """Draw every image and give every image every score that is not there yet.

    Raises:
        Failure: the device has no memory left, or a scorer does not give a number an image.
    """
    with memory_of_samples(job.batch_size):
        # All images before all scores: a model that draws and a reward model are never in memory together.
        draw(job)
        score(job)


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
    """Give every shard the scores that it lacks, scorer by scorer.

    Raises:
        Failure: as `scored` does.
    """
    for located in job.scorers:
        name = located.name
        missing = [shard for shard in job.shards() if name not in sample_store.columns(shard.path)]
        if not missing:
            continue
        scorer = located.load(job.device, job.batch_size)
        with Progress(total=sum(len(shard.rows) for shard in missing), desc=f"score {name}", unit="image") as bar:
            for shard in missing:
                found = scored(name, scorer, sample_store.read_images(shard.path), shard.captions, shard.model)
                sample_store.add_scores(shard.path, {name: found[TOTAL]})
                bar.update(len(shard.rows))
        del scorer  # as above
