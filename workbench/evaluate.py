"""`python -m workbench.evaluate`: samples of models for prompt sets, scored by reward models, win rates, tables."""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workbench.common.command_line import command, silence_transformers
from workbench.common.errors import Failure
from workbench.common.validation import Finite

if TYPE_CHECKING:
    import polars as pl

    from workbench.evaluation.plan import Job
    from workbench.evaluation.prompt_sets import PromptSet
    from workbench.tracking import Client

#: The paper's averages to stand beside ours, by what `--paper` is told: name in `workbench.paper`, heading.
PAPERS = {"sd15": ("TABLE_1", "paper, SD1.5"), "sdxl": ("TABLE_2", "paper, SDXL")}
TITLES = {"win-rates": "### Win rates of {ours}, %", "scores": "### Mean scores"}
TRACKED = "tracked.json"
FROM_0, FROM_1 = click.IntRange(min=0), click.IntRange(min=1)


@click.option("--model", "models", multiple=True, metavar="NAME=SOURCE", help="A model to compare. Repeatable.")
@click.option(
    "--base", default="", metavar="SOURCE", help="The model on which a folder of UNet or LoRA weights alone is used."
)
@click.option(
    "--prompts", "sources", multiple=True, metavar="[NAME=]SOURCE", help="A prompt set. Repeatable. Default: embedded."
)
@click.option("--limit", type=FROM_0, default=0, metavar="N", help="Only the first N prompts of each set; 0 = all.")
@click.option(
    "--scorer", "scorers", multiple=True, metavar="NAME[=SOURCE]", help="A reward model. Repeatable. Default: reward."
)
@click.option("--seeds", type=FROM_1, default=2, show_default=True, help="Images a prompt; the paper draws 5.")
@click.option(
    "--steps", type=FROM_1, default=12, show_default=True, help="Steps of the sampler; 50 is usual for SD1.5."
)
@click.option(
    "--guidance",
    type=Finite(min=1),
    default=3.0,
    show_default=True,
    help="Classifier-free guidance; 7.5 is usual for SD1.5.",
)
@click.option(
    "--resolution", type=FROM_0, default=0, show_default=True, help="Edge of the images, pixels; 0 = the model's own."
)
@click.option(
    "--batch-size", type=FROM_1, default=24, show_default=True, help="Images at once; decides speed and memory alone."
)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Precision of sampling. Scorers always use float32.",
)  # fmt: skip
@click.option("--variant", default="", metavar="NAME", help="Weight files of hub models, such as fp16.")
@click.option("--ours", default="", metavar="NAME", help="The model whose wins are counted. Default: the first.")
@click.option("--paper", type=click.Choice([*PAPERS]), help="Show the averages of its Table 1 or 2 beside ours.")
@click.option(
    "--grid", type=FROM_0, default=6, show_default=True, help="Prompts in the sheet of samples; 0 = no sheet."
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("reports/evaluation"), show_default=True)
@click.option("--name", default="", help="The tracked run's name. Default: the output folder's.")
@click.option("--images/--no-images", default=True, help="Whether the images go to MLflow too, or the scores alone.")
def main(**options: Any) -> None:
    """Draw the same prompts with the same noise from several models, score the images, count who wins.

    A model is a diffusers folder, a hub id (ORG/NAME or ORG/NAME@REVISION), "embedded" (the small model), runs:/RUN_ID
    (a tracked run that kept its weights), study:NAME (all of a study's that did; write --model study:NAME), or, with
    --base, a folder that holds unet/, transformer/ or pytorch_lora_weights.safetensors alone.

    A prompt set is "embedded" or "validation" (the small model's), a text file, Pick-a-Pic's parquet files,
    PartiPrompts' TSV, HPDv2's JSON lists or a folder of them. Prompts and scorers must fit: "reward" judges only what
    the small model draws; pickscore, hpsv2, clip, aesthetic and imagereward judge anything. These fetch their weights
    from the hub unless told a folder: NAME=FOLDER.

    OUTPUT/data holds images and scores as parquet files that Hugging Face's datasets read, OUTPUT the win rates
    (Tables 1 and 2), mean scores (as in Table 3) and a sheet of samples; all goes to MLflow as a run. Stop it whenever
    you like: the same command goes on where it was. Another command with the same OUTPUT adds models, scorers or prompt
    sets (with --seeds and --limit of their own) to what is there, and draws nothing twice.

    \b
    Examples:
      python -m workbench.evaluate --model ours=trained/ --model pretrained=embedded
      python -m workbench.evaluate --model study:claims --model pretrained=embedded --ours ours --seeds 5
      python -m workbench.evaluate --model ours=runs:/RUN_ID
         --model pretrained=stable-diffusion-v1-5/stable-diffusion-v1-5
         --prompts "Pick-a-Pic v2=pickapic/test_unique.parquet" --prompts PartiPrompts=PartiPrompts.tsv
         --scorer pickscore --scorer hpsv2 --scorer clip --scorer aesthetic --scorer imagereward
         --seeds 5 --steps 50 --guidance 7.5 --dtype float16 --paper sd15 --output reports/evaluation/sd15
    """
    silence_transformers()
    import torch

    from workbench import tracking
    from workbench.common.distributed import pick_device
    from workbench.evaluation.plan import plan

    client = tracking.connect()
    job = plan(client, pick_device(options["device"]), options)
    try:
        draw(job)
        score(job)
    except torch.OutOfMemoryError:
        lower = f"lower --batch-size (now {job.batch_size}) or --resolution, or draw with --dtype float16"
        raise Failure(f"out of memory: {lower}; what is done is kept, and the same command goes on") from None
    except KeyboardInterrupt:
        click.echo(f"Stopped. What is done is kept in {job.output}; the same command goes on.", err=True)
        raise
    report(client, job, options)


# --- doing it -------------------------------------------------------------------------------------------------


def draw(job: "Job") -> None:
    """Draw every shard that is not there."""
    from tqdm import tqdm

    from workbench.evaluation import sample_store, sources

    sampling = job.record["sampling"]
    missing = [shard for shard in job.shards() if "image" not in sample_store.columns(shard.path)]
    with tqdm(total=sum(len(shard.rows) for shard in missing), desc="draw", unit="image", disable=not missing) as bar:
        for name, shards in groupby(missing, key=lambda shard: shard.model):
            bar.set_postfix_str(name)
            backend, denoiser = sources.open_model(job.contenders[name], job.device, sampling)
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
            del backend, denoiser  # before the next one is loaded


def score(job: "Job") -> None:
    """Give every shard the scores that it lacks.

    Raises:
        Failure: a score is not a number.
    """
    import numpy as np
    from tqdm import tqdm

    from workbench.evaluation import reward_models, sample_store

    for name, files in job.judges.items():
        missing = [shard for shard in job.shards() if name not in sample_store.columns(shard.path)]
        if not missing:
            continue
        scorer = reward_models.load(name, files, job.device, job.batch_size)
        with tqdm(total=sum(len(shard.rows) for shard in missing), desc=f"score {name}", unit="image") as bar:
            for shard in missing:
                values = scorer(np.stack(sample_store.read_images(shard.path)), shard.captions)
                if not np.isfinite(values).all():
                    place = shard.captions[int(np.flatnonzero(~np.isfinite(values))[0])]
                    raise Failure(f"--scorer {name}: not a finite score for {shard.model}'s image of {place!r}")
                sample_store.add_scores(shard, name, values)
                bar.update(len(values))
        del scorer


# --- telling it -----------------------------------------------------------------------------------------------


def report(client: "Client", job: "Job", options: Mapping[str, Any]) -> None:
    """Write tables and sheets beside the data, track them, and say what came out."""
    from workbench import tracking
    from workbench.analysis import paper, tables, win_rates
    from workbench.evaluation import sample_store
    from workbench.evaluation.reward_models import SCORERS
    from workbench.tracking import ui

    headings = {name: SCORERS[name].heading for name in job.record["scorers"]}
    scores = sample_store.read_scores([shard.path for shard in job.shards()], list(headings))
    means = win_rates.score_means(scores, list(headings))
    shown = {"scores": win_rates.score_table(means, headings)}
    numbers = {"scores": means}
    if len(job.record["models"]) > 1:
        numbers["win-rates"] = win_rates.win_rates(scores, job.ours, list(headings))
        printed, source = PAPERS.get(options["paper"], ("", ""))
        shown["win-rates"] = win_rates.win_table(numbers["win-rates"], headings, getattr(paper, printed, {}), source)
    for name, table in numbers.items():
        table.write_csv(job.output / f"{name}.csv")
        tables.save(shown[name], job.output.resolve(), name)
    scores.write_parquet(job.output / "scores.parquet")
    for one in job.prompts.values():
        _sheet(job, one, options["grid"])
    note = "\n".join(f"{TITLES[name].format(ours=job.ours)}\n\n{tables.markdown(shown[name])}" for name in shown)
    click.echo(f"\n{note}")
    track(client, job, numbers, note, options)
    click.echo(f"Folder:       {job.output}\nOpen the UI:  {tracking.ui_command()}")
    click.echo(f"              {ui.evaluations_link(client)}")


def _sheet(job: "Job", prompts: "PromptSet", wanted: int) -> None:
    import polars as pl

    from workbench.analysis import sample_sheet
    from workbench.evaluation import sample_store

    rows = sample_sheet.rows_shown(len(prompts.prompts), wanted)
    if not rows:
        return
    chosen = pl.col("row").is_in(rows) & (pl.col("seed") == 0)
    images: dict[str, list] = {name: [] for name in job.record["models"]}
    for shard in job.shards():
        if shard.prompts.name == prompts.name and set(rows) & set(shard.rows):
            images[shard.model] += sample_store.read_images(shard.path, chosen)
    figure = sample_sheet.sheet(images, [prompts.prompts[row] for row in rows])
    sample_sheet.save(figure, job.output / f"samples-{prompts.name}.png")


def track(
    client: "Client", job: "Job", numbers: "Mapping[str, pl.DataFrame]", note: str, options: Mapping[str, Any]
) -> None:
    """Put it all into MLflow as one run, unless the same is there already."""
    from workbench import tracking
    from workbench.common.cache import digest
    from workbench.tracking import tags
    from workbench.training.provenance import provenance

    name = options["name"] or job.output.resolve().name
    shards = [shard.path for shard in job.shards()]
    result = digest("evaluation-1", name, job.ours, note, *(table.write_csv() for table in numbers.values()))
    done = job.output / TRACKED
    known = json.loads(done.read_text()) if done.is_file() else {}
    store = digest(tracking.tracking_uri())  # which may hold a password
    if known.get("digest") == result and known.get("store") == store:
        click.echo(f"Tracked:      as run {known['run']} before; nothing has changed")
        return
    params = {"evaluation.ours": job.ours}
    params |= {f"evaluation.{key}": value for key, value in job.record["sampling"].items()}
    for kind in ("models", "prompts", "scorers"):
        for one, about in job.record[kind].items():
            params |= {f"{kind}.{one}.{key}": value for key, value in about.items() if value != ""}
    datasets = {f"prompts {one.name}": (one.digest, {"prompts": len(one.prompts)}) for one in job.prompts.values()}
    datasets["samples"] = (result, {"images": sum(len(shard.rows) for shard in job.shards())})
    about = provenance() | {tags.KIND: "evaluation", tags.NOTE: note}
    tracker = tracking.Tracker(client, name, params=params, tags=about, datasets=datasets)
    state = "failed"
    try:
        tracker.log(0, metrics(job, numbers))
        for path in sorted(path for path in job.output.glob("[!.]*.*") if path.is_file() and path != done):
            tracker.artifact(path)
        for path in shards if options["images"] else []:
            tracker.artifact(path, f"data/{path.parent.name}")
        for run_id, found in scores_of_runs(job, numbers["scores"]).items():
            tracking.add_scores(client, run_id, found)
        state = "complete"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        tracker.close(state)
    done.write_text(json.dumps({"digest": result, "store": store, "run": tracker.run_id}))
    click.echo(f"Tracked:      as run {tracker.run_id}")


def metrics(job: "Job", numbers: "Mapping[str, pl.DataFrame]") -> dict[str, float]:
    """Means as MLflow's metrics: `eval/SCORER/MODEL` and `win_rate/SCORER/OURS_vs_MODEL`, under PROMPTS if several."""
    found = {}
    for row in numbers["scores"].to_dicts():
        found[f"eval/{_under(job, row)}/{row['model']}"] = row["mean"]
    for row in numbers["win-rates"].to_dicts() if "win-rates" in numbers else []:
        found[f"win_rate/{_under(job, row)}/{job.ours}_vs_{row['against']}"] = row["mean"]
    return found


def scores_of_runs(job: "Job", means: "pl.DataFrame") -> dict[str, dict[str, float]]:
    """For each tracked run that was evaluated its mean scores as `eval/SCORER`, under PROMPTS if several.

    Not the true reward, which runs measure themselves, with their own sampler settings.
    """
    found: dict[str, dict[str, float]] = {}
    for row in means.to_dicts():
        source = job.record["models"][row["model"]]["source"]
        if source.startswith("runs:/") and row["scorer"] != "reward":
            found.setdefault(source.removeprefix("runs:/"), {})[f"eval/{_under(job, row)}"] = row["mean"]
    return found


def _under(job: "Job", row: Mapping[str, Any]) -> str:
    return row["scorer"] if len(job.prompts) == 1 else f"{row['prompts']}/{row['scorer']}"


main = command(main)

if __name__ == "__main__":
    main()
