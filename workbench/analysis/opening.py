"""The first part of a report's page, from the stores: the texts of `story`, the pictures, the regime."""

import base64
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from workbench import tracking
from workbench.analysis import sample_sheet, story
from workbench.analysis.claims import regime
from workbench.common.contact_sheet import evenly_spread
from workbench.common.errors import UserError
from workbench.common.outputs import output_file
from workbench.studies import results
from workbench.tracking.overview import Overview

PICTURE = "before-after.png"  #: file in the report's folder
COLUMNS = 12  #: prompts of the picture


def opening(study: str, runs: pl.DataFrame, about: Overview, folder: Path) -> str:
    """What came out, in Markdown, down to the settings; writes the picture before and after into the folder.

    Args:
        runs: all of the study.
    """
    objectives, constraints = _judged_by(study, about)
    objectives = objectives or story.usual_objectives(runs)
    best = story.best_run(runs, objectives, constraints)
    measures = regime.of_runs(runs)
    sections = [
        f"# Report on study {study}",
        story.headline(runs, objectives, best),
        _pictures(runs, best, folder) if best else "",
        (regime.sentence(measures, regime.RUNS) or "The runs are in the paper's regime.") if measures else "",
        "## Trials",
        story.trial_table(runs, objectives, about.counts),
        "## Made with",
        story.made_with(runs, about, study, datetime.now()),
    ]
    return "\n\n".join(section for section in sections if section)


def _judged_by(study: str, about: Overview) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """A study's objectives and constraints: as its run has them, or as this study database has them, or none."""
    if about.objectives:
        return about.objectives, about.constraints
    # Studies of earlier versions say it in Optuna's database alone.
    declared = results.declared(study.partition("@")[0])
    return (declared.objectives, declared.constraints) if declared else ({}, {})


def _pictures(runs: pl.DataFrame, best: Mapping[str, Any], folder: Path) -> str:
    """The best run's samples below the pretrained model's for the same prompts and noise; empty where it has none."""
    own = runs.filter(pl.col("run_id") == best["run_id"])
    after, before = tracking.load_sheets(own), tracking.load_sheets(own, pretrained=True)
    run, samples = best["run_id"], None
    with suppress(UserError):
        samples = tracking.load_samples(own)
    if run not in after or run not in before or samples is None:
        return ""
    captions = samples["caption"].unique(maintain_order=True).to_list()
    shown = evenly_spread(len(captions), COLUMNS)
    size = after[run].shape[1] // len(captions)
    # A sheet has a column a prompt and a row an image seed: the first row is shown.
    cut = [slice(place * size, (place + 1) * size) for place in shown]
    images = {
        model: [sheet[:size, part] for part in cut]
        for model, sheet in (("pretrained", before[run]), (story.name_of(best), after[run]))
    }
    gains = (samples["reward"] - samples["pretrained_reward"]).to_list()
    figure = sample_sheet.before_after(images, [captions[place] for place in shown], [gains[place] for place in shown])
    with output_file(folder / PICTURE) as path:
        sample_sheet.save(figure, path)
    text = (
        f"The pretrained model above, {story.name_of(best)} below: the same {len(shown)} prompts, evenly spread over "
        "the test prompts, and the same noise. Numbers are what the true reward has gained."
    )
    data = base64.b64encode((folder / PICTURE).read_bytes()).decode()
    return f"![before and after](data:image/png;base64,{data})\n\n{text}"
