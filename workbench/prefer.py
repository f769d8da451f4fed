"""`python -m workbench.prefer`: draw preference pairs with the small model and label them by the ground-truth reward."""

from pathlib import Path

import click

from workbench.cli import command, silence_transformers


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
@click.option("--scorer", type=click.Path(path_type=Path), help="The scorer's folder. Default: the embedded one.")
@click.option("--train-pairs", default=6, show_default=True, help="Pairs a training prompt (432 prompts).")
@click.option("--validation-pairs", default=7, show_default=True, help="Pairs a validation prompt (72 prompts).")
@click.option("--steps", default=20, show_default=True, help="DDIM steps.")
@click.option("--guidance", default=2.0, show_default=True, help="Classifier-free guidance.")
@click.option("--slope", default=2.0, show_default=True, help="Bradley-Terry slope, per unit of reward.")
@click.option("--tie", default=0.05, show_default=True, help="Smaller differences of reward are ties.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(
    out: Path,
    model: str,
    scorer: Path | None,
    train_pairs: int,
    validation_pairs: int,
    steps: int,
    guidance: float,
    slope: float,
    tie: float,
    seed: int,
    device: str,
) -> None:
    """Draw preference pairs with a model and label them by the ground-truth reward with Bradley-Terry noise.

    Writes train.parquet and validation.parquet with Pick-a-Pic v2's columns (images as lossless WebP bytes, and
    each image's reward beside them) and test_prompts.txt; the three share no prompt. The reward is documented in
    workbench/rewards.py. To replace the pairs that come with the workbench: --out workbench/assets/pairs.
    """
    import hashlib
    import io
    import random

    import polars as pl
    from PIL import Image
    from tqdm import tqdm

    from workbench.backends import ASSETS, StableDiffusion, pick_device
    from workbench.prompts import split
    from workbench.rewards import Classifier, reward

    silence_transformers()
    place = pick_device(device)
    backend = StableDiffusion(model, place)
    denoiser = backend.denoiser()
    judge = Classifier(scorer or ASSETS / "scorer", place)
    prompts = split()
    out.mkdir(parents=True, exist_ok=True)
    (out / "test_prompts.txt").write_text("".join(f"{p}\n" for p in prompts["test"]))
    name = "small-diffusion"
    for part, (set_name, count) in enumerate((("train", train_pairs), ("validation", validation_pairs))):
        rng = random.Random(seed * 2 + part)
        captions = [str(p) for p in prompts[set_name] for _ in range(2 * count)]
        seeds = [(seed * 2 + part) * 10_000_000 + i for i in range(len(captions))]
        rows = []
        for start in tqdm(range(0, len(captions), 64), desc=f"{set_name} pairs", unit="batch"):
            chunk = slice(start, start + 64)
            images = backend.sample(
                denoiser, captions[chunk], seeds[chunk], steps=steps, guidance=guidance, batch_size=64
            )
            scores = reward(judge, images, captions[chunk])
            for i in range(0, len(images), 2):
                stored = []
                for image in images[i : i + 2]:
                    stream = io.BytesIO()
                    Image.fromarray(image).save(stream, "WEBP", lossless=True, quality=100, method=6)
                    stored.append(stream.getvalue())
                uids = [hashlib.sha1(b).hexdigest() for b in stored]
                first = label(float(scores[i] - scores[i + 1]), slope, tie, rng.random())
                best = "tie" if first == 0.5 else uids[0] if first == 1 else uids[1]
                number = (start + i) // 2
                rows.append(
                    {
                        "are_different": uids[0] != uids[1],
                        "best_image_uid": best,
                        "caption": captions[start + i],
                        "created_at": None,
                        "has_label": True,
                        "image_0_uid": uids[0],
                        "image_1_uid": uids[1],
                        "image_0_url": "",
                        "image_1_url": "",
                        "jpg_0": stored[0],
                        "jpg_1": stored[1],
                        "label_0": first,
                        "label_1": 1.0 - first,
                        "model_0": name,
                        "model_1": name,
                        "ranking_id": number,
                        "user_id": 0,
                        "num_example_per_prompt": count,
                        "reward_0": float(scores[i]),
                        "reward_1": float(scores[i + 1]),
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
