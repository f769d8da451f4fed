"""`python -m workbench.prefer`: draw preference pairs with the small model and label them."""

from pathlib import Path

import click

from workbench.common.command_line import command, silence_transformers


def label(difference: float, slope: float, tie: float, uniform: float) -> float:
    """Label of the first image: Bradley-Terry, 1 with probability sigmoid(slope * difference), 0.5 for a tie.

    Args:
        difference: reward of the first image minus the second's.
        slope: how sure the labeller is, per unit of reward.
        tie: differences smaller than this are ties.
        uniform: a draw from [0, 1).
    """
    import math

    if abs(difference) < tie:
        return 0.5
    return float(uniform < 1 / (1 + math.exp(-slope * difference)))


@click.option("--out", type=click.Path(path_type=Path), default=Path("pretrain/assets/pairs"), show_default=True)
@click.option("--model", default="embedded", show_default=True, help="Checkpoint folder that draws the images.")
@click.option(
    "--scorers", type=click.Path(path_type=Path), help="Folder of scorer and critic. Default: the embedded ones."
)
@click.option("--train-pairs", default=6, show_default=True, help="Pairs a training prompt (432 prompts).")
@click.option("--validation-pairs", default=7, show_default=True, help="Pairs a validation prompt (72 prompts).")
@click.option(
    "--steps",
    multiple=True,
    type=int,
    default=(4, 8, 20),
    show_default=True,
    help="DDIM steps of an image are drawn from these. Repeatable.",
)
@click.option(
    "--guidance",
    multiple=True,
    type=float,
    default=(1.0, 2.0, 3.0),
    show_default=True,
    help="Guidance of an image is drawn from these. Repeatable.",
)
@click.option("--slope", default=10.0, show_default=True, help="Bradley-Terry slope, per unit of reward.")
@click.option("--tie", default=0.05, show_default=True, help="Smaller differences of reward are ties.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(
    out: Path,
    model: str,
    scorers: Path | None,
    train_pairs: int,
    validation_pairs: int,
    steps: tuple[int, ...],
    guidance: tuple[float, ...],
    slope: float,
    tie: float,
    seed: int,
    device: str,
) -> None:
    """Draw preference pairs with a model and label them by the ground-truth reward with Bradley-Terry noise.

    Writes train.parquet and validation.parquet with Pick-a-Pic v2's columns (images as lossless WebP bytes, and
    each image's reward beside them) and the prompts to draw, test_prompts.txt and
    validation_prompts.txt; the sets share no prompt. The reward is documented in
    workbench/models/small/reward.py. To replace the pairs that come with the workbench:
    --out workbench/models/small/assets/pairs.
    """
    import hashlib
    import io
    import random

    import polars as pl
    from PIL import Image
    from tqdm import tqdm

    from workbench.common.distributed import pick_device
    from workbench.models import ASSETS, load
    from workbench.models.small.prompts import split
    from workbench.models.small.reward import Reward

    silence_transformers()
    place = pick_device(device)
    backend = load(model, place)
    denoiser = backend.denoiser()
    reward = Reward(scorers or ASSETS, place)
    prompts = split()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("test", "validation"):
        (out / f"{name}_prompts.txt").write_text("".join(f"{p}\n" for p in prompts[name]))
    for part, (set_name, count) in enumerate((("train", train_pairs), ("validation", validation_pairs))):
        rng = random.Random(seed * 2 + part)
        wanted = pl.DataFrame({"caption": [str(p) for p in prompts[set_name] for _ in range(2 * count)]})
        wanted = wanted.with_row_index("image").with_columns(
            seed=(seed * 2 + part) * 10_000_000 + pl.col("image").cast(pl.Int64),
            guidance=pl.Series([rng.choice(guidance) for _ in range(len(wanted))]),
            steps=pl.Series([rng.choice(steps) for _ in range(len(wanted))]),
        )
        drawn: dict[int, tuple[bytes, float]] = {}
        bar = tqdm(total=len(wanted), desc=f"{set_name} images", unit="image")
        for (scale, count_of_steps), group in wanted.group_by("guidance", "steps", maintain_order=True):
            for chunk in group.iter_slices(96):
                captions = chunk["caption"].to_list()
                images = backend.sample(
                    denoiser,
                    captions,
                    chunk["seed"].to_list(),
                    steps=int(count_of_steps),
                    guidance=float(scale),
                    batch_size=96,
                )
                for i, image, score in zip(chunk["image"], images, reward(images, captions), strict=True):
                    stream = io.BytesIO()
                    Image.fromarray(image).save(stream, "WEBP", lossless=True, quality=100, method=6)
                    drawn[i] = stream.getvalue(), float(score)
                bar.update(len(chunk))
        bar.close()
        rows = []
        for number in range(len(wanted) // 2):
            pair = wanted[2 * number : 2 * number + 2]
            (jpg_0, reward_0), (jpg_1, reward_1) = (drawn[i] for i in pair["image"])
            uids = [hashlib.sha1(jpg).hexdigest() for jpg in (jpg_0, jpg_1)]
            models = [
                f"small-diffusion, {n} steps, guidance {g:g}"
                for n, g in zip(pair["steps"], pair["guidance"], strict=True)
            ]
            label_0 = label(reward_0 - reward_1, slope, tie, rng.random())
            rows.append(
                {
                    "are_different": uids[0] != uids[1],
                    "best_image_uid": "tie" if label_0 == 0.5 else uids[0 if label_0 == 1 else 1],
                    "caption": pair["caption"][0],
                    "created_at": None,
                    "has_label": True,
                    "image_0_uid": uids[0],
                    "image_1_uid": uids[1],
                    "image_0_url": "",
                    "image_1_url": "",
                    "jpg_0": jpg_0,
                    "jpg_1": jpg_1,
                    "label_0": label_0,
                    "label_1": 1.0 - label_0,
                    "model_0": models[0],
                    "model_1": models[1],
                    "ranking_id": number,
                    "user_id": 0,
                    "num_example_per_prompt": count,
                    "reward_0": reward_0,
                    "reward_1": reward_1,
                }
            )
        frame = pl.DataFrame(rows, schema_overrides={"created_at": pl.Datetime("us")})
        partial = out / f"{set_name}.tmp"
        frame.write_parquet(partial, compression="zstd")
        partial.replace(out / f"{set_name}.parquet")
        used = frame.filter(pl.col("label_0") != 0.5)
        agree = used.select(((pl.col("reward_0") > pl.col("reward_1")) == (pl.col("label_0") == 1)).mean()).item()
        click.echo(
            f"{set_name}: {len(frame)} pairs, {len(frame) - len(used)} ties, {agree:.1%} of labels favour the better "
            f"image, reward {frame.select(pl.mean_horizontal('reward_0', 'reward_1').mean()).item():.2f} on average"
        )


main = command(main)

if __name__ == "__main__":
    main()
