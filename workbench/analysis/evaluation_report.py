"""What an evaluation leaves: win rates and mean scores in the paper's layout, sheets of samples, a tracked run."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from workbench import tracking
from workbench.analysis import paper, sample_sheet, tables, win_rates
from workbench.common.cache import digest
from workbench.common.contact_sheet import evenly_spread
from workbench.common.errors import UserError
from workbench.common.files import in_place
from workbench.evaluation import Job, PromptSet, Request, complete, prepare, read_images, read_scores, scorers
from workbench.models.safe_loading import read_json
from workbench.tracking import tags, ui
from workbench.tracking.artifacts import check_artifacts
from workbench.training.provenance import provenance

#: Key of --paper -> name of the printed averages in `analysis.paper`, and their column's heading.
PAPERS = {"sd15": ("TABLE_1", "paper, SD1.5"), "sdxl": ("TABLE_2", "paper, SDXL")}
TITLES = {"win-rates": "### Win rates of {ours}, %", "scores": "### Mean scores"}
#: File that says which tracked run has a folder's results, so that the same results are not tracked twice.
TRACKED = "tracked.json"


class Report(NamedTuple):
    """What the person sees at the end of an evaluation.

    Attributes:
        tables: in Markdown.
        run: id of the tracked run.
        is_new: whether this evaluation made the run; False = an earlier one did, with the same results.
        link: the page of evaluations in MLflow's user interface.
    """

    tables: str
    run: str
    is_new: bool
    link: str


def evaluate(request: Request) -> Report:
    """Draw, score, write tables and sheets beside the images, and track all of it as a run.

    Raises:
        UserError: a mistake in the request.
        Failure: something that it needs did not work; what is done is kept.
    """
    job = prepare(request)
    # A mistake in the request has made no tracking store; a store that is away is found before anything is drawn.
    client = tracking.connect()
    check_artifacts(client)  # before hours of drawing that could not be tracked
    complete(job)
    numbers, text = write(job, request.paper, request.grid)
    run_id, is_new = track(client, job, numbers, text, request.name, request.images)
    return Report(text, run_id, is_new, ui.evaluations_link(client))


def write(job: Job, printed: str | None = None, grid: int = 0) -> tuple[dict[str, pl.DataFrame], str]:
    """Write tables, scores and sheets into an evaluation's folder.

    Args:
        printed: key of PAPERS whose averages stand beside ours, or None.
        grid: prompts in a sheet of samples; 0 = no sheet.
    Returns:
        The numbers by name of the table, and the tables in Markdown.
    """
    headings = {name: scorers.heading(name) for name in job.settings["scorers"]}
    scores = read_scores([shard.path for shard in job.shards()], list(headings))
    means = win_rates.score_means(scores, list(headings))
    numbers, layouts = {"scores": means}, {"scores": win_rates.score_table(means, headings)}
    if len(job.settings["models"]) > 1:
        rates = numbers["win-rates"] = win_rates.win_rates(scores, job.ours, list(headings))
        table, heading = PAPERS.get(printed or "", ("", ""))
        layouts["win-rates"] = win_rates.win_table(rates, headings, getattr(paper, table, {}), heading)
    for name, layout in layouts.items():
        with in_place(job.output / f"{name}.csv") as path:
            numbers[name].write_csv(path)
        with in_place(job.output / f"{name}.md") as path:
            path.write_text(tables.markdown(layout), encoding="utf-8")
    with in_place(job.output / "scores.parquet") as path:
        scores.write_parquet(path)
    for prompt_set in job.prompts.values():
        _write_sheet(job, prompt_set, grid)
    parts = [f"{TITLES[name].format(ours=job.ours)}\n\n{tables.markdown(layout)}" for name, layout in layouts.items()]
    return numbers, "\n".join(parts)


def _write_sheet(job: Job, prompts: PromptSet, wanted: int) -> None:
    """Write the sheet of samples of a prompt set: each prompt's first image by every model."""
    rows = evenly_spread(len(prompts.prompts), wanted)
    if not rows:
        return
    chosen = pl.col("row").is_in(rows) & (pl.col("seed") == 0)
    images: dict[str, list] = {name: [] for name in job.settings["models"]}
    for shard in job.shards():
        if shard.prompts.name == prompts.name and set(rows) & set(shard.rows):
            images[shard.model] += read_images(shard.path, chosen)
    figure = sample_sheet.sheet(images, [prompts.prompts[row] for row in rows])
    sample_sheet.save(figure, job.output / f"samples-{prompts.name}.png")


def track(
    client: tracking.Client, job: Job, numbers: Mapping[str, pl.DataFrame], text: str, name: str, images: bool
) -> tuple[str, bool]:
    """Put an evaluation into MLflow as one run, unless a run with the same results is there already.

    Args:
        numbers, text: from `write`.
        name: of the run; empty = the output folder's.
        images: whether the images go there too, or the scores alone.
    Returns:
        The run's id, and whether it is new.
    """
    name = name or job.output.resolve().name
    result = digest("evaluation-1", name, job.ours, text, *(table.write_csv() for table in numbers.values()))
    # A digest of the store's address, not the address: it may hold a password.
    now = {"digest": result, "store": digest(tracking.tracking_uri())}
    record = job.output / TRACKED
    before = _tracked(record)
    # The record may have more keys than these, such as the run's id.
    if now.items() <= before.items():
        return before["run"], False
    datasets = {f"prompts {one.name}": (one.digest, {"prompts": len(one.prompts)}) for one in job.prompts.values()}
    datasets["samples"] = (result, {"images": sum(len(shard.rows) for shard in job.shards())})
    about = provenance() | {tags.KIND: "evaluation", tags.NOTE: text}
    tracker = tracking.Tracker(client, name, params=parameters(job), tags=about, datasets=datasets)
    state = "failed"
    try:
        tracker.log(0, metrics(job, numbers))
        _attach_files(tracker, job, images)
        for run_id, scores in scores_of_runs(job, numbers["scores"]).items():
            # Before the run is complete: after a kill here all is tracked again, and these get the same scores.
            tracking.add_scores(client, run_id, scores)
        state = "complete"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        tracker.close(state)
    with in_place(record) as path:  # last: a run that did not end is tracked again
        path.write_text(json.dumps(now | {"run": tracker.run_id}), encoding="utf-8")
    return tracker.run_id, True


def _tracked(record: Path) -> dict[str, str]:
    """What a folder says of the run that has its results; nothing where it does not say, and they are tracked again."""
    with suppress(UserError):
        found = read_json(record, TRACKED)
        if isinstance(found.get("run"), str):
            return found
    return {}


def _attach_files(tracker: tracking.Tracker, job: Job, images: bool) -> None:
    files = (path for path in job.output.glob("[!.]*.*") if path.is_file() and path.suffix != ".partial")
    # Hidden files and unfinished ones stay here, and so does the record of the run that they go to.
    for path in sorted(path for path in files if path.name != TRACKED):
        tracker.artifact(path)
    for shard in job.shards() if images else []:
        tracker.artifact(shard.path, f"data/{shard.path.parent.name}")


def parameters(job: Job) -> dict[str, Any]:
    """What decides an evaluation's numbers, as MLflow's parameters: `evaluation.KEY` and `KIND.NAME.KEY`."""
    params = {"evaluation.ours": job.ours}
    params |= {f"evaluation.{key}": value for key, value in job.settings["sampling"].items()}
    for kind in ("models", "prompts", "scorers"):
        for name, about in job.settings[kind].items():
            params |= {f"{kind}.{name}.{key}": value for key, value in about.items() if value != ""}
    return params


def metrics(job: Job, numbers: Mapping[str, pl.DataFrame]) -> dict[str, float]:
    """Means as MLflow's metrics: `eval/SCORER/MODEL` and `win_rate/SCORER/OURS_vs_MODEL`, under PROMPTS if several."""
    values = {}
    for row in numbers["scores"].to_dicts():
        values[f"eval/{_scorer_path(job, row)}/{row['model']}"] = row["mean"]
    for row in numbers["win-rates"].to_dicts() if "win-rates" in numbers else []:
        values[f"win_rate/{_scorer_path(job, row)}/{job.ours}_vs_{row['against']}"] = row["mean"]
    return values


def scores_of_runs(job: Job, means: pl.DataFrame) -> dict[str, dict[str, float]]:
    """The mean scores that each evaluated run of a study gets, as `eval/SCORER`, under PROMPTS if several.

    Not the true reward: runs measure that themselves, with their own sampler settings, and the two would mix.

    Returns:
        Run id -> metric -> value.
    """
    scores: dict[str, dict[str, float]] = {}
    for row in means.to_dicts():
        source = job.settings["models"][row["model"]]["source"]
        trained = source.startswith("runs:/") and "@" not in source  # not a checkpoint on its way
        if trained and row["scorer"] != "reward":
            of_run = scores.setdefault(source.removeprefix("runs:/"), {})
            of_run[f"eval/{_scorer_path(job, row)}"] = row["mean"]
    return scores


def _scorer_path(job: Job, row: Mapping[str, Any]) -> str:
    """The part of a metric's name that says which reward model, and which prompt set where there are several."""
    return row["scorer"] if len(job.prompts) == 1 else f"{row['prompts']}/{row['scorer']}"
