"""`python -m workbench.prefer`: draw preference pairs with the small model and label them."""

from pathlib import Path

import click

from workbench.common.command_line import command, silence_transformers

PROMPTS = ("test", "validation", "unseen")


@click.option("--out", type=click.Path(path_type=Path), default=Path("pretrain/assets/pairs"), show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("pretrain/drawn"),
    show_default=True,
    help="Folder of the images drawn so far; a killed command goes on from them.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("embedded",),
    show_default=True,
    help="Checkpoint folder that draws images. Repeatable: the first draws 60 % of them, the others share the rest.",
)
@click.option(
    "--scorers", type=click.Path(path_type=Path), help="Folder of scorer and critic. Default: the embedded ones."
)
@click.option("--train-groups", default=1, show_default=True, help="Groups of 4 images, 3 pairs, a training prompt.")
@click.option("--validation-groups", default=2, show_default=True, help="The same of a validation prompt.")
@click.option("--prompts", default=0, help="Use the first so many prompts of each set; 0 = all.")
@click.option(
    "--steps",
    multiple=True,
    type=int,
    default=(8, 12, 16),
    show_default=True,
    help="DDIM steps of an image are drawn from these. Repeatable.",
)
@click.option(
    "--guidance",
    multiple=True,
    type=float,
    default=(1.5, 2.0, 3.0, 5.0),
    show_default=True,
    help="Guidance of an image is drawn from these. Repeatable.",
)
@click.option("--slope", default=2.0, show_default=True, help="Bradley-Terry slope, per unit of reward.")
@click.option("--tie", default=0.08, show_default=True, help="Smaller differences of reward are ties.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(
    out: Path,
    work: Path,
    models: tuple[str, ...],
    scorers: Path | None,
    train_groups: int,
    validation_groups: int,
    prompts: int,
    steps: tuple[int, ...],
    guidance: tuple[float, ...],
    slope: float,
    tie: float,
    seed: int,
    device: str,
) -> None:
    """Draw preference pairs with the small model and label them by the ground-truth reward, with Bradley-Terry noise.

    Writes train.parquet and validation.parquet with Pick-a-Pic v2's columns (AVIF images, and beside them each image's
    reward and its parts) and the prompts to draw, test_prompts.txt, validation_prompts.txt and unseen_prompts.txt; the
    sets share no prompt. workbench/models/small/reward.py documents the reward. About ten minutes on one core. To
    replace the pairs that come with the workbench: remove them, then --out workbench/models/small/assets/pairs.
    """
    from workbench.common.distributed import pick_device
    from workbench.common.outputs import output_file, require_own
    from workbench.models import ASSETS
    from workbench.models.small import pairs
    from workbench.models.small.prompts import split
    from workbench.models.small.reward import Reward

    silence_transformers()
    place = pick_device(device)
    # Whatever can be missing is loaded before anything is written.
    backends, reward, sets = pairs.load_models(models, place), Reward(scorers or ASSETS, place), split()
    out.mkdir(parents=True, exist_ok=True)
    # Asked before the images are drawn, which takes minutes.
    require_own(out, *(f"{name}_prompts.txt" for name in PROMPTS), "train.parquet", "validation.parquet")
    for name in PROMPTS:
        with output_file(out / f"{name}_prompts.txt") as path:
            path.write_text("".join(f"{p}\n" for p in sets[name]), encoding="utf-8")
    for part, (name, groups) in enumerate((("train", train_groups), ("validation", validation_groups))):
        captions = [str(p) for p in sets[name]][: prompts or None]
        # 2 seed + part: training and validation pairs never share noise, whatever the seed.
        drawings = pairs.plan(captions, groups, list(backends), steps=steps, guidance=guidance, seed=2 * seed + part)
        images = pairs.draw(drawings, backends, work / name)
        made = pairs.rows(drawings, images, reward, slope=slope, tie=tie, seed=2 * seed + part)
        with output_file(out / f"{name}.parquet") as path:
            pairs.write(made, path)
        ties, right = pairs.agreement(made)
        click.echo(f"{name}: {len(made)} pairs, {ties} ties; {right:.1%} of the other labels favour the better image")


main = command(main)

if __name__ == "__main__":
    main()
