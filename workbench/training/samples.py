"""Images that a model draws for the test prompts, and how they compare with the pretrained model's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from workbench import models
from workbench.common import cache, distributed
from workbench.common.errors import UserError
from workbench.common.progress import Progress
from workbench.common.stats import mean_interval, wins
from workbench.data.rows import read_prompts
from workbench.models import Backend
from workbench.models.small.prompts import parse
from workbench.models.small.reward import PARTS, ImageModel, Reward, concept_likelihood, total
from workbench.training.tables import Evaluation


@dataclass(frozen=True)
class Samples:
    """Images of a model for fixed captions and seeds, with their scores.

    Attributes:
        images: (N, H, W, 3).
        rewards: ground-truth reward, (N,).
        judged: log-probability that the independent judge gives the named concept, (N,).
        parts: what the rewards are the sum of, by name, (N,) each.
    """

    captions: Sequence[str]
    seeds: Sequence[int]
    images: NDArray[np.uint8]
    rewards: NDArray[np.float64]
    judged: NDArray[np.float64]
    parts: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def part(self, places: Sequence[int]) -> "Samples":
        """Some of the images, by index."""
        chosen = list(places)
        captions, seeds = [self.captions[i] for i in chosen], [self.seeds[i] for i in chosen]
        parts = {name: values[chosen] for name, values in self.parts.items()}
        return Samples(captions, seeds, self.images[chosen], self.rewards[chosen], self.judged[chosen], parts)


#: What `compare` measures, as `eval/NAME`.
COMPARED = (
    "reward", "reward_gain", "judge", "judge_gain", "win_rate", "win_rate_low", "win_rate_high",
    *(f"{part}_gain" for part in PARTS),
)  # fmt: skip
#: What `progress` measures, as `samples/NAME`.
PROGRESS = ("reward", "reward_gain", "win_rate")


def compare(ours: Samples, theirs: Samples) -> dict[str, float]:
    """Mean reward, its parts and win rate of one model against another, same prompts and seeds, ties as half.

    The interval resamples prompts, not images: images of one prompt are not independent.
    """
    won = wins(ours.rewards, theirs.rewards)
    by_caption: dict[str, list[float]] = {}  # in order of appearance, on which the seeded resampling depends
    for caption, one in zip(ours.captions, won.tolist(), strict=True):
        by_caption.setdefault(caption, []).append(one)
    low, high = mean_interval([np.mean(each) for each in by_caption.values()])
    return {
        "eval/reward": float(ours.rewards.mean()),
        "eval/reward_gain": float((ours.rewards - theirs.rewards).mean()),
        "eval/judge": float(ours.judged.mean()),
        "eval/judge_gain": float((ours.judged - theirs.judged).mean()),
        "eval/win_rate": float(won.mean()),
        "eval/win_rate_low": low,
        "eval/win_rate_high": high,
        **{f"eval/{part}_gain": float((ours.parts[part] - theirs.parts[part]).mean()) for part in ours.parts},
    }


def progress(ours: Samples, theirs: Samples) -> dict[str, float]:
    """Mean reward and win rate on the few images that are drawn while a model trains; without intervals."""
    return {
        "samples/reward": float(ours.rewards.mean()),
        "samples/reward_gain": float((ours.rewards - theirs.rewards).mean()),
        "samples/win_rate": float(wins(ours.rewards, theirs.rewards).mean()),
    }


#: Scores images, given where in the plan each stands.
Scorer = Callable[[NDArray[np.uint8], Sequence[int]], Samples]


@dataclass(frozen=True)
class Sampling:
    """How a run's samples are drawn and scored; the same for every model, so that models are compared on equal noise.

    Attributes:
        captions: the test prompts; none where nothing is drawn.
        scorer: None where the samples are not scored (`evaluation.seeds` = 0).
        pretrained: the pretrained model's images of the whole plan, (N, H, W, 3); None where they are not scored.
    """

    backend: Backend
    settings: Evaluation
    captions: list[str]
    scorer: Scorer | None = None
    pretrained: NDArray[np.uint8] | None = None

    @cached_property
    def baseline(self) -> Samples | None:
        """The pretrained model's samples of the whole plan, scored when first asked for; None as `pretrained`.

        Not before: scoring takes a second, for which a study's first step would wait.
        """
        if self.scorer is None or self.pretrained is None:
            return None
        return self.scorer(self.pretrained, range(len(self.pretrained)))

    def draw(
        self,
        denoiser: nn.Module,
        captions: Sequence[str],
        seeds: Sequence[int],
        on_share: Callable[[float], object] = lambda share: None,
    ) -> NDArray[np.uint8]:
        """An image a caption, (N, H, W, 3); each process draws its share and has all of them.

        Args:
            on_share: called after each batch with the share of the images that are drawn, 0 to 1.
        """
        done = 0

        def drawn(count: int) -> None:
            nonlocal done
            done += count
            on_share(done / len(mine))

        mine = distributed.spread(len(captions)).tolist()
        images = self.backend.sample(
            denoiser,
            [captions[i] for i in mine],
            [seeds[i] for i in mine],
            steps=self.settings.steps,
            guidance=self.settings.guidance,
            batch_size=self.settings.batch_size,
            drawn=drawn,
        )
        return distributed.collect(torch.from_numpy(images), len(captions)).numpy()

    def draw_plan(
        self, denoiser: nn.Module, on_share: Callable[[float], object] = lambda share: None
    ) -> NDArray[np.uint8]:
        """The images of the whole plan, (N, H, W, 3); `on_share` as `draw` takes it."""
        return self.draw(denoiser, *plan(self.captions, self.settings.seeds), on_share)


def plan(captions: list[str], seeds: int) -> tuple[list[str], list[int]]:
    """Caption and seed of every image of the final evaluation: all captions with the first seed, then the next."""
    # The order matters: the preview takes the first images of the plan as one of each caption, with the first seed.
    return captions * seeds, [seed for seed in range(seeds) for _ in captions]


def prepare_sampling(captions: list[str], settings: Evaluation, backend: Backend, pretrained: nn.Module) -> Sampling:
    """Load what scores images, and draw the pretrained model's samples where the cache lacks them.

    Args:
        captions: as `read_captions` returns them.
    """
    sampling = Sampling(backend, settings, captions)
    if not settings.seeds:
        return sampling
    reward, judge = Reward(models.ASSETS, backend.device), ImageModel(models.ASSETS / "judge", backend.device)
    plan_captions, plan_seeds = plan(captions, settings.seeds)

    def score(images: NDArray[np.uint8], places: Sequence[int]) -> Samples:
        chosen, seeds = [plan_captions[i] for i in places], [plan_seeds[i] for i in places]
        parts = reward.parts(images, chosen)
        judged = concept_likelihood(judge(images), chosen)
        return Samples(chosen, seeds, images, total(parts), judged, parts)

    # Once for all runs on this model and these prompts: drawing the baseline costs as much as evaluating a run.
    key = cache.digest("samples-1", backend.digest(*backend.parts), captions, settings.model_dump_json())
    stored = cache.cached("samples", key, lambda: {"images": torch.from_numpy(_with_bar(sampling, pretrained))})
    return Sampling(backend, settings, captions, score, stored["images"].numpy())


def _with_bar(sampling: Sampling, pretrained: nn.Module) -> NDArray[np.uint8]:
    """The pretrained model's images of the whole plan, drawn with a progress bar of this process's share."""
    count = len(sampling.captions) * sampling.settings.seeds
    with Progress(
        total=count, desc="draw the pretrained model's samples", unit="image", leave=False,
        disable=not distributed.is_main(),
    ) as bar:  # fmt: skip
        return sampling.draw_plan(pretrained, lambda share: bar.update(round(share * count) - bar.n))


def read_captions(source: str, settings: Evaluation) -> list[str]:
    """The test prompts that a run draws; none where it draws nothing.

    Args:
        source: the setting `data.prompts`.
    Raises:
        UserError: no such prompts, or the ground-truth reward cannot judge one of them and is to.
    """
    if not settings.seeds and not settings.grid:
        return []
    captions = list(read_prompts(source))
    try:
        # Found before hours of encoding, not when the first samples are scored.
        for caption in captions if settings.seeds else []:
            parse(caption)
    except ValueError as error:
        raise UserError(
            f"data.prompts = {source!r}: the ground-truth reward cannot judge this prompt ({error}); "
            "set evaluation.seeds=0 to draw without judging"
        ) from None
    return captions
