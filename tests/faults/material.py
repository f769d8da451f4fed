"""What a campaign trains: a tiny random model, tiny pairs, a study of them, and what its arms come to undisturbed."""

import hashlib
import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from safetensors.torch import load_file

from tests.support import families
from tests.support.helpers import pair_rows
from tests.support.runs import run
from workbench import tracking
from workbench.models.small.prompts import split
from workbench.studies.experiment import Experiment
from workbench.training.config import merge
from workbench.training.experiment_file import read

EXPERIMENT = """
model.path = "{place}/model"
data.train = "{place}/pairs.parquet"
data.validation = "{place}/pairs.parquet"
data.prompts = "{place}/prompts.txt"
train.steps = {steps}
train.batch_size = 4
train.lr = 1e-3
train.keep = true
diagnostics.interval = 10
diagnostics.probe = 8
diagnostics.draws = 1
reference.interval = 4
evaluation.seeds = 1
evaluation.steps = 2
evaluation.grid = 2
snapshots.interval = 4

[sweep]
trials = {trials}
objective = "validation/accuracy"
prune.above = 1e9

[sweep.arms]
frozen = {{ "reference.policy" = "frozen" }}
update = {{ "reference.policy" = "update", "reference.rate" = 0.5 }}
{more}
[sweep.space]
"train.lr" = {{ type = "FloatDistribution", low = 1e-4, high = 1e-3, log = true }}
"""
MORE = """
reinit = { "reference.on_exceed" = "reinit", "reference.delta" = 1e-4 }
lora = { "lora.rank" = 2, "train.lr" = 1e-2 }
"""


@dataclass
class Result:
    """What a run came to, to the bit: its metrics by step, and a digest of each of its weights."""

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def history(self) -> pl.DataFrame:
        return tracking.history(self.rows)


class _Listener(Result):
    """Hears a run that nobody disturbs."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.setdefault(step, {}).update(metrics)

    def image(self, *_: Any) -> None: ...

    def picture(self, *_: Any) -> None: ...

    def table(self, *_: Any) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.weights = digests(path)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor below a folder, by its name; a file's header is not alike twice."""
    found = (load_file(path).items() for path in folder.rglob("*.safetensors"))
    return {name: hashlib.sha256(tensor.numpy()).hexdigest() for items in found for name, tensor in items}


def make(place: Path, steps: int, trials: int, *, small: bool) -> Path:
    """Write model, pairs and the experiment's file, with four arms, or two for a `small` one."""
    families.make("sd", place / "model")
    pl.DataFrame(pair_rows(24)).write_parquet(place / "pairs.parquet")
    prompts = random.Random(0).sample(split()["test"], 2)
    (place / "prompts.txt").write_text("\n".join(map(str, prompts)))
    path = place / "study.toml"
    path.write_text(EXPERIMENT.format(place=place, steps=steps, trials=trials, more="" if small else MORE))
    assert tomllib.loads(path.read_text())
    return path


def arms(experiment: Path) -> dict[str, Result]:
    """What each arm comes to, by name."""
    return {arm.name: undisturbed(experiment, arm.overrides) for arm in Experiment.resolve(read(experiment)).arms}


def undisturbed(experiment: Path, overrides: Mapping[str, Any]) -> Result:
    """What a trial comes to that is trained here, in one piece, without a study and without snapshots."""
    listener = _Listener()
    run(merge(read(experiment), overrides), listener)
    return listener
