"""Draw and score what an evaluation's folder lacks; stopped at any time, it goes on where it was."""

from functools import partial

from workbench.evaluation import filling, sample_store
from workbench.evaluation.filling import Scores, Undrawn, Unscored
from workbench.evaluation.plan import Job
from workbench.evaluation.scorers import Located
from workbench.evaluation.scoring import TOTAL, memory_of_samples


def complete(job: Job) -> None:
    """Draw every image and give every image every score that is not there yet.

    Raises:
        Failure: the device has no memory left, or a scorer does not give a number an image.
    """
    with memory_of_samples(job.batch_size):
        # All images before all scores: a model that draws and a reward model are never in memory together.
        filling.draw(
            _undrawn(job),
            job.models,
            device=job.device,
            sampling=job.settings["sampling"],
            batch_size=job.batch_size,
        )
        for located in job.scorers:
            filling.score(
                located,
                _unscored(job, located),
                device=job.device,
                batch_size=job.batch_size,
                columns=partial(_total, located.name),
            )


def _undrawn(job: Job) -> list[Undrawn]:
    """The shards that have no images."""
    steps, guidance = (job.settings["sampling"][key] for key in ("steps", "guidance"))
    return [
        Undrawn(
            shard.model, shard.captions, shard.noise_seeds, steps, guidance, partial(sample_store.write_images, shard)
        )
        for shard in job.shards()
        if "image" not in sample_store.columns(shard.path)
    ]


def _unscored(job: Job, located: Located) -> list[Unscored]:
    """The shards that lack a scorer's scores."""
    return [
        Unscored(shard.path, shard.model, shard.captions)
        for shard in job.shards()
        if located.name not in sample_store.columns(shard.path)
    ]


def _total(column: str, scores: Scores) -> Scores:
    """The score alone, without those of its parts."""
    return {column: scores[TOTAL]}
