"""`python -m workbench.pretrain`: rebuild the small model, its scorers and its judge from licensed artwork."""

from pathlib import Path

import click

from workbench.common.command_line import command, device_option, silence_transformers

STAGES = ["scorer", "judge", "critic", "autoencoder", "denoiser", "verdict"]


@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("pretrain/assets"), show_default=True,
    help="Folder of the models.",
)  # fmt: skip
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("pretrain"),
    show_default=True,
    help="Folder of checkpoints.",
)
@device_option
@click.option("--scorer-steps", default=2000, show_default=True, help="Steps of 64 images; the critic's too.")
@click.option("--judge-steps", default=2000, show_default=True, help="Steps of 64 images.")
@click.option("--autoencoder-steps", default=3000, show_default=True, help="Steps of 16 images.")
@click.option("--denoiser-steps", default=8000, show_default=True, help="Steps of 64 images.")
@click.option("--pool", default=40_000, show_default=True, help="Encoded pictures that the denoiser trains on.")
@click.option("--batch-factor", default=1, show_default=True, help="Factor on all batches: 8 suits a GPU.")
@click.option("--steps", default=12, show_default=True, help="DDIM steps of the verdict's samples.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance of the verdict's samples.")
@click.option("--prompts", default=0, help="Prompts of each set in the verdict; 0 = all.")
@click.option(
    "--only",
    type=click.Choice(STAGES),
    multiple=True,
    help="Just this stage; the others' checkpoints must be there. Repeatable.",
)
def main(
    out: Path,
    work: Path,
    device: str,
    scorer_steps: int,
    judge_steps: int,
    autoencoder_steps: int,
    denoiser_steps: int,
    pool: int,
    batch_factor: int,
    steps: int,
    guidance: float,
    prompts: int,
    only: tuple[str, ...],
) -> None:
    """Rebuild the small model, its scorer, critic and judge from openly licensed artwork.

    The artwork comes from the npm registry, by name, at pinned versions (needs Node.js, and the extra
    `pip install -e .[pretrain]`). Every stage keeps a checkpoint in WORK and resumes from it. About three hours on
    one CPU core by arithmetic (docs/small-model.md), minutes on a GPU. Writes to OUT: model/ (a diffusers checkpoint
    folder in half precision), scorer/, critic/, judge/, verdict.json and samples.png; and to WORK the denoiser after
    20 and 50 % of its training, as model-20/ and model-50/. To replace what comes with the workbench: --out
    workbench/models/small/assets, then `python -m workbench.prefer --model embedded --model pretrain/model-50 --model
    pretrain/model-20 --out workbench/models/small/assets/pairs`.
    """
    import torch

    from workbench.common.distributed import pick_device
    from workbench.models.small import artwork, stages

    silence_transformers()
    place, wanted = pick_device(device), only or tuple(STAGES)
    work.mkdir(parents=True, exist_ok=True)
    # The verdict alone needs no artwork, and so no npm.
    if set(wanted) != {"verdict"}:
        art = artwork.load(work / "artwork").to(place)
        batch = 64 * batch_factor
        for kind, count in (("scorer", scorer_steps), ("judge", judge_steps), ("critic", scorer_steps)):
            if kind in wanted:
                # A seed for each, so that a stage begins with the same weights alone (--only) as among the others.
                torch.manual_seed(STAGES.index(kind))
                report = stages.image_model(kind, art, work, out / kind, steps=count, batch=batch)
                click.echo(f"{kind}: " + ", ".join(f"{name} {value:.4g}" for name, value in report.items()))
        if "autoencoder" in wanted:
            decibels = stages.autoencoder(art, work, out / "scorer", steps=autoencoder_steps, batch=16 * batch_factor)
            click.echo(f"autoencoder: {decibels:.1f} dB on held-out drawings")
        if "denoiser" in wanted:
            stages.denoiser(art, work, out / "model", steps=denoiser_steps, batch=batch, pool=pool)
    if "verdict" in wanted:
        for name, found in stages.verdicts(
            out, steps=steps, guidance=guidance, device=place, limit=prompts or None
        ).items():
            click.echo(f"{name} prompts: " + ", ".join(f"{part} {value:.3f}" for part, value in found.items()))


main = command(main)

if __name__ == "__main__":
    main()
