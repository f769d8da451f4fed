"""`python -m workbench.prefer`: draw preference pairs with any model, and label them by reward models."""

from pathlib import Path
from typing import Any

import click

from workbench.common.command_line import command, device_option, one_process, silence_transformers
from workbench.common.validation import LARGEST, Finite

FROM_0, FROM_1 = click.IntRange(min=0), click.IntRange(min=1)
PATH: Any = click.Path(path_type=Path)


@click.option(
    "--model", "models", multiple=True, metavar="[NAME=]SOURCE", default=("embedded",), show_default=True,
    help="A model that draws. Repeatable.",
)  # fmt: skip
@click.option(
    "--base", default="", metavar="SOURCE", help="The model on which a folder of UNet or LoRA weights alone is used."
)
@click.option("--variant", default="", metavar="NAME", help="Weight files of hub models, such as fp16.")
@click.option(
    "--prompts", multiple=True, metavar="[NAME=]SOURCE",
    help="A prompt set, whose pairs become OUT/NAME.parquet. Repeatable. Default: the small model's train and "
    "validation.",
)  # fmt: skip
@click.option("--limit", type=FROM_0, default=0, metavar="N", help="Only the first N prompts of each set; 0 = all.")
@click.option(
    "--scorer", "scorers", multiple=True, metavar="NAME[=SOURCE]", default=("reward",), show_default=True,
    help="A reward model, or a function of yours, FILE.py:FUNCTION. Repeatable.",
)  # fmt: skip
@click.option(
    "--images", type=FROM_1, default=4, show_default=True,
    help="Images a prompt; with --settings all, of each combination of settings.",
)  # fmt: skip
@click.option(
    "--settings", type=click.Choice(["random", "all"]), default="random", show_default=True,
    help="random: each image has noise of its own, and a model, steps and guidance drawn at random; the first model "
    "draws 60 %, the others share the rest. all: every noise with each combination of them.",
)  # fmt: skip
@click.option(
    "--steps", multiple=True, type=FROM_1, default=(8, 12, 16), show_default=True,
    help="Steps of the sampler. Repeatable; 50 is usual for SD1.5.",
)  # fmt: skip
@click.option(
    "--guidance", multiple=True, type=Finite(min=0), default=(1.5, 2.0, 3.0, 5.0), show_default=True,
    help="The sampler's guidance scale. Repeatable; 7.5 is usual for SD1.5.",
)  # fmt: skip
@click.option(
    "--pairs", type=click.Choice(["fours", "best-worst", "halves", "all"]), default="fours", show_default=True,
    help="Which images of a prompt make a pair. fours: of each four (a, b), (d, c), (a, c), whatever their scores; "
    "halves: the better half against the other, rank by rank; all: every two.",
)  # fmt: skip
@click.option(
    "--label", type=click.Choice(["bradley-terry", "score", "vote"]), default="bradley-terry", show_default=True,
    help="Which of the two is preferred. bradley-terry: drawn, the better one more often; score: the better one; vote: "
    "that of most scorers.",
)  # fmt: skip
@click.option(
    "--gap", type=Finite(min=0), default=0.0, show_default=True,
    help="Leave out pairs whose scores differ by less. In the scorer's unit, or with several scorers in standard "
    "deviations of their mean.",
)  # fmt: skip
@click.option(
    "--tie", type=Finite(min=0), default=0.08, show_default=True,
    help="Smaller differences are ties, which training leaves out; a vote does not look at it.",
)  # fmt: skip
@click.option(
    "--slope", type=Finite(min=0), default=2.0, show_default=True,
    help="Of bradley-terry: an image whose score is higher by d is preferred with probability sigmoid(slope * d).",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, LARGEST), default=0, show_default=True, help="Of noise, settings and labels."
)
@click.option(
    "--resolution", type=FROM_0, default=0, show_default=True, help="Edge of the images, pixels; 0 = the model's own."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Precision of sampling. Scorers always use float32.",
)  # fmt: skip
@device_option
@click.option("--batch-size", type=FROM_1, default=64, show_default=True, help="Images at once.")
@click.option(
    "--image-format", type=click.Choice(["avif", "png"]), default="avif", show_default=True,
    help="How images are stored. avif: small, quality 80; png: loses nothing, and takes about ten times as much.",
)  # fmt: skip
@click.option("--sheet", type=FROM_0, default=24, show_default=True, help="Pairs in the picture; 0 = no picture.")
@click.option("--out", type=PATH, default=Path("pretrain/assets/pairs"), show_default=True, help="Folder of the pairs.")
@click.option(
    "--work", type=PATH, default=Path("pretrain/drawn"), show_default=True,
    help="Folder of the images drawn and scored so far; a killed command goes on from them.",
)  # fmt: skip
def main(pairs: str, label: str, gap: float, tie: float, slope: float, settings: str, **options: Any) -> None:
    """Draw prompts several times over, score the images, and write preference pairs that training reads.

    A model is a diffusers folder, a hub id (ORG/NAME or ORG/NAME@REVISION), "embedded" (the small model), runs:/RUN_ID
    (a tracked run that kept its weights), or, with --base, a folder that holds unet/, transformer/ or
    pytorch_lora_weights.safetensors alone. Prompt sets and scorers are those of `python -m workbench.evaluate --help`;
    the scorer "reward" judges only what the small model draws.

    Of each prompt set, OUT gets NAME.parquet (Pick-a-Pic v2's columns, and each image's scores as SCORER_0, SCORER_1;
    of several scorers also score_0, score_1, the mean of their standardised scores, by which pairs are chosen),
    NAME.png (some pairs, the preferred image left) and NAME_agreement.csv (how often scorers and labels agree). Sets
    called train and validation are found by data.train=OUT and data.validation=OUT. Identical images never make a
    pair. Stop it whenever you like: the same command goes on, and another one draws only what is not in WORK.

    \b
    Without options: the small model's own pairs, by its true reward and with Bradley-Terry noise, and beside them the
    prompts to test with. About ten minutes on one core. To replace those that come with the workbench: remove them,
    then --out workbench/models/small/assets/pairs.

    \b
    Examples:
      python -m workbench.prefer --limit 8 --out pairs --work drawn
      python -m workbench.prefer --model ORG/NAME --prompts train=mine.txt --prompts validation=others.txt
         --scorer pickscore --scorer imagereward --images 8 --steps 50 --guidance 7.5 --dtype float16
         --pairs best-worst --label vote --out pairs --work drawn
      python -m workbench.train --set model.path=ORG/NAME --set data.train=pairs --set data.validation=pairs
         --set data.prompts=mine.txt --set evaluation.seeds=0
    """
    silence_transformers()
    one_process()
    # Imported here, so that --help does not wait for it.
    from workbench.evaluation import pairing, preferences

    rule = pairing.Rule(pairs, label, gap, tie, slope)
    job = preferences.prepare(preferences.Request(rule=rule, every=settings == "all", **options))
    try:
        made = preferences.complete(job)
    except KeyboardInterrupt:
        click.echo(f"Stopped. What is drawn is kept in {options['work']}; the same command goes on.", err=True)
        raise
    for one in made:
        left_out = f"{one.pairs.identical} of identical images and {one.pairs.close} too close left out"
        click.echo(f"{one.name}: {len(one.pairs.made)} pairs of {one.prompts} prompts, {one.ties} ties; {left_out}")
        for count in one.counts:
            decided = count.agree + count.disagree
            share = f"{count.agree / decided:.1%}" if decided else "none"
            click.echo(f"  {count.one} and {count.other} agree in {share} of {decided} pairs; {count.tied} undecided")
    click.echo(f"Folder: {options['out']}")


main = command(main)

if __name__ == "__main__":
    main()
