"""`python -m workbench.evaluate`: samples of models for prompt sets, scored by reward models, win rates, tables."""

from pathlib import Path
from typing import Any

import click

from workbench.common.command_line import command, device_option, silence_transformers
from workbench.common.validation import Finite

FROM_0, FROM_1 = click.IntRange(min=0), click.IntRange(min=1)


@click.option("--model", "models", multiple=True, metavar="NAME=SOURCE", help="A model to compare. Repeatable.")
@click.option(
    "--base", default="", metavar="SOURCE", help="The model on which a folder of UNet or LoRA weights alone is used."
)
@click.option("--prompts", multiple=True, metavar="[NAME=]SOURCE", help="A prompt set. Repeatable. Default: embedded.")
@click.option("--limit", type=FROM_0, default=0, metavar="N", help="Only the first N prompts of each set; 0 = all.")
@click.option(
    "--scorer",
    "scorers",
    multiple=True,
    metavar="NAME[=SOURCE]",
    help="A reward model, or a function of yours, FILE.py:FUNCTION. Repeatable. Default: reward, or with --paper its "
    "five.",
)
@click.option("--seeds", type=FROM_1, default=2, show_default=True, help="Images a prompt; the paper draws 5.")
@click.option(
    "--steps", type=FROM_1, default=12, show_default=True, help="Steps of the sampler; 50 is usual for SD1.5."
)
@click.option(
    "--guidance",
    type=Finite(min=0),
    default=3.0,
    show_default=True,
    help="Scale of the pipeline's guidance; 1 = none, for Z-Image 0. 7.5 is usual for SD1.5.",
)
@click.option(
    "--resolution", type=FROM_0, default=0, show_default=True, help="Edge of the images, pixels; 0 = the model's own."
)
@click.option(
    "--batch-size", type=FROM_1, default=24, show_default=True, help="Images at once; decides speed and memory alone."
)
@device_option
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Precision of sampling. Scorers always use float32.",
)  # fmt: skip
@click.option("--variant", default="", metavar="NAME", help="Weight files of hub models, such as fp16.")
@click.option("--ours", default="", metavar="NAME", help="The model whose wins are counted. Default: the first.")
@click.option(
    "--paper",
    type=click.Choice(["sd15", "sdxl"]),
    help="Show the averages of its Table 1 or 2 beside ours; its five scorers are then the default.",
)
@click.option(
    "--grid", type=FROM_0, default=6, show_default=True, help="Prompts in the sheet of samples; 0 = no sheet."
)
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("reports/evaluation"), show_default=True,
    help="Folder of images, scores and tables.",
)  # fmt: skip
@click.option("--name", default="", help="The tracked run's name. Default: the output folder's.")
@click.option("--images/--no-images", default=True, help="Whether the images go to MLflow too, or the scores alone.")
def main(**options: Any) -> None:
    """Draw the same prompts with the same noise from several models, score the images, count who wins.

    A model is a diffusers folder, a hub id (ORG/NAME or ORG/NAME@REVISION), "embedded" (the small model), runs:/RUN_ID
    (a tracked run that kept its weights), runs:/RUN_ID@STEP (its checkpoint of a step), study:NAME (every run of a
    study that kept its weights; given without NAME=), or, with --base, a folder that holds unet/, transformer/ or
    pytorch_lora_weights.safetensors alone.

    A prompt set is "embedded" or "validation" (the small model's), a text file, Pick-a-Pic's parquet files,
    PartiPrompts' TSV, HPDv2's JSON lists or a folder of them. Prompts and scorers must fit: "reward" judges only what
    the small model draws; pickscore, hpsv2, clip (OpenAI's ViT-L/14), clip-h (OpenCLIP's ViT-H/14, probably the
    paper's CLIP score), aesthetic and imagereward judge anything. Their weights come from the hub, or from a folder:
    NAME=FOLDER. A function of yours, mine.py:warmth or NAME=mine.py:warmth, takes images and prompts and gives one
    number an image.

    OUTPUT/data holds images and scores as parquet files that Hugging Face's datasets read, OUTPUT the win rates
    (as in the paper's Tables 1 and 2), mean scores (Table 3) and a sheet of samples; all goes to MLflow as a run. Stop
    it whenever you like: the same command goes on where it was. Another command with the same OUTPUT adds models,
    scorers or prompt sets (with --seeds and --limit of their own) to what is there, and draws nothing twice.

    \b
    Examples:
      python -m workbench.evaluate --model ours=trained/ --model pretrained=embedded
      python -m workbench.evaluate --model study:NAME --model pretrained=embedded --ours ours --seeds 5
         (all runs of a study that was made with --set train.keep=true)
      python -m workbench.evaluate --model a=trained/ --model b=ORG/NAME --prompts mine.txt --scorer imagereward
      python -m workbench.evaluate --model ours=runs:/RUN_ID
         --model pretrained=stable-diffusion-v1-5/stable-diffusion-v1-5
         --prompts "Pick-a-Pic v2=pickapic/test_unique.parquet" --prompts PartiPrompts=PartiPrompts.tsv
         --seeds 5 --steps 50 --guidance 7.5 --dtype float16 --paper sd15 --output reports/evaluation/sd15
    """
    silence_transformers()
    # Imported here, so that --help does not wait for it.
    from workbench.analysis.evaluation_report import evaluate
    from workbench.evaluation import Request
    from workbench.tracking import ui_command

    try:
        report = evaluate(Request(**options))
    except KeyboardInterrupt:
        click.echo(f"Stopped. What is done is kept in {options['output']}; the same command goes on.", err=True)
        raise
    tracked = f"as run {report.run}" if report.is_new else f"as run {report.run} before; nothing has changed"
    click.echo(f"\n{report.tables}\nTracked:      {tracked}")
    click.echo(f"Folder:       {options['output']}\nOpen the UI:  {ui_command()}\n              {report.link}")


main = command(main)

if __name__ == "__main__":
    main()
