"""Models against models: prompts drawn by each from the same noise, and scored by reward models.

It imports what lies below it (`tracking`, `training`, `data`, `models`, `method`, `common`).
"""

from workbench.evaluation.model_sources import ModelSource
from workbench.evaluation.plan import Job, Request, prepare
from workbench.evaluation.prompt_sets import PromptSet
from workbench.evaluation.reward_models import REWARD_MODELS, RewardModel, Scorer
from workbench.evaluation.run import complete
from workbench.evaluation.sample_store import Shard, read_images, read_scores

__all__ = [
    "REWARD_MODELS",
    "Job",
    "ModelSource",
    "PromptSet",
    "Request",
    "RewardModel",
    "Scorer",
    "Shard",
    "complete",
    "prepare",
    "read_images",
    "read_scores",
]
