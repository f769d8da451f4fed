"""`python -m workbench.pretrain`: rebuild the small model, its scorers and its judge from licensed artwork."""

import copy
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workbench.common.command_line import command, silence_transformers

if TYPE_CHECKING:
    from torch import nn

    from workbench.models.small.recipe import Loss

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Small Diffusion: 24 things, 8 backgrounds, 3 artists, 32 pixels

A Stable Diffusion in miniature ({unet:.1f}M-parameter UNet, {vae:.1f}M-parameter KL autoencoder to 8x8x12 latents,
{text:.2f}M-parameter CLIP text encoder; SD1.5's noise schedule, epsilon prediction), made to study preference
optimisation on a laptop. `StableDiffusionPipeline.from_pretrained` loads it like SD1.5. It draws "a CONCEPT on a
COLOUR background, STYLE style"; `workbench/models/small/prompts.py` lists the 576 prompts. Not meant for any other use.

## How good it is
Measured on one sample of each of the 576 prompts ({steps}-step DDIM, guidance {guidance:g}), by
`python -m workbench.pretrain --only verdict`; the judge is a vision transformer trained on the artwork, used neither
in the reward nor in training.

| | share | 95 % interval (Wilson) |
| --- | --- | --- |
| the judge names the drawn concept | {concept:.1%} | {concept_low:.1%} to {concept_high:.1%} |
| nearest palette colour of the border is the named one | {colour:.1%} | {colour_low:.1%} to {colour_high:.1%} |

Mean ground-truth reward {reward:.2f} (0 is a perfect drawing), mean damage by the critic {damage:.2f}.

![samples](samples.png)

## Data
Drawings of 24 concepts by three open emoji sets, fetched by name from the npm registry, not part of this repository:
Noto Emoji (Google, Apache-2.0; `@iconify-json/noto` {noto}), Fluent Emoji Flat (Microsoft, MIT;
`@iconify-json/fluent-emoji-flat` {fluent}), Twemoji (Twitter and contributors, CC-BY-4.0; `@iconify-json/twemoji`
{twemoji}). The autoencoder, scorer and judge also saw the sets' other shared drawings. Samples derive from those
drawings: attribute the three sets when you publish them.

## Recipe
`python -m workbench.pretrain` rebuilds everything here ({autoencoder_steps} autoencoder steps of 16 images,
then the denoiser with min-SNR weights, AdamW, weights averaged at 0.999, a tenth of the captions dropped:
{framed_steps} steps of 64 on drawings framed as published, {denoiser_steps} on drawings scattered over the canvas in
any size, slant and mirroring). It is stopped before it draws perfectly, on purpose: preference optimisation needs
something to win. A rebuild gives a model equal in kind, not bit for bit: the shipped one's first denoiser stage was
stopped in the middle of a longer decay.

## Known weaknesses
Fine detail (faces, window panes, toppings) is often smeared; outlines wobble; it knows no prompt outside its grammar.
The reward is a function of two small networks and the border's colour: a policy can please it without pleasing a
person, so look at the samples as well as at the numbers.
"""


def fit(
    name: str,
    module: "nn.Module",
    loss: "Loss",
    work: Path,
    *,
    steps: int,
    lr: float,
    ema_decay: float = 0.0,
    save_every: float = 60.0,
) -> None:
    """Minimise `loss` over `module`'s weights with AdamW and a cosine decay, resumably.

    Each step's draws come from a generator seeded with the step, so a resumed run draws what an
    uninterrupted one would have. On return the module holds the averaged weights if `ema_decay` > 0.

    Args:
        loss: draws a batch from the generator and returns the scalar loss.
        work: folder of the checkpoint `NAME.pt`, written atomically every `save_every` seconds.
        ema_decay: largest decay of the weights' running average; 0 keeps the last weights.
    """
    import torch
    from torch import Generator, nn
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    warmup = min(300, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=lr * 0.01),
        ],
        [warmup],
    )
    average = copy.deepcopy(module)
    path, start = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=next(module.parameters()).device)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    def save(step: int) -> None:
        state = {
            "step": step,
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    module.train()
    saved, recent = time.monotonic(), []
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
    for step in bar:
        value = loss(Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (step + 1) / (step + 10)) if ema_decay else 0.0
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        recent.append(value.detach())
        if len(recent) == 100:
            mean = torch.stack(recent).mean().item()
            if mean != mean:
                raise FloatingPointError(f"{name}: loss is not finite near step {step}")
            bar.set_postfix(loss=f"{mean:.4f}")
            recent.clear()
        if time.monotonic() - saved > save_every:
            save(step + 1)
            saved = time.monotonic()
    save(steps)
    module.load_state_dict(average.state_dict())
    module.eval().requires_grad_(False)


def save_model(out: Path, vae, text_encoder, tokenizer, unet, scaling_factor: float) -> None:
    """Write the diffusers checkpoint folder in half precision."""
    from diffusers import StableDiffusionPipeline

    from workbench.models.checkpoints import declare_float32
    from workbench.models.small.recipe import new_scheduler

    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline: Any = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(text_encoder),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(out, safe_serialization=True)
    declare_float32(out / "text_encoder" / "config.json")


def verdict(out: Path, steps: int, guidance: float, made: dict[str, int]) -> None:
    """Draw every prompt once, ask the judge, and write the model card and the sample grid beside the weights."""
    import numpy as np
    import torch
    from PIL import Image
    from scipy.stats import binomtest

    from workbench.common.contact_sheet import contact_sheet
    from workbench.models import load
    from workbench.models.small.artwork import PACKAGES
    from workbench.models.small.prompts import split
    from workbench.models.small.reward import ImageModel, Reward, names_concept, nearest_colour

    backend = load(str(out / "model"), torch.device("cpu"))
    prompts = [p for part in split().values() for p in part]
    captions, unet = [str(p) for p in prompts], backend.denoiser()
    images = backend.sample(unet, captions, list(range(len(captions))), steps=steps, guidance=guidance, batch_size=64)
    reward = Reward(out)
    named = names_concept(ImageModel(out / "judge"), images, captions)
    coloured = np.array([a == p.colour for a, p in zip(nearest_colour(images), prompts, strict=True)])
    share: dict[str, float] = {}
    for name, hits in (("concept", named), ("colour", coloured)):
        interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        share |= {name: hits.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    card = CARD.format(
        unet=millions(unet),
        vae=millions(backend.pipeline.vae),
        text=millions(backend.pipeline.text_encoder),
        steps=steps,
        guidance=guidance,
        reward=reward(images, captions).mean(),
        damage=reward.critic(images)[:, 0].clamp(0, 1).mean().item(),
        **share,
        **{style: package.version for style, package in PACKAGES.items()},
        **made,
    )
    (out / "model" / "README.md").write_text(card)
    Image.fromarray(contact_sheet(images[-72:], columns=18)).save(out / "model" / "samples.png")
    click.echo(
        f"The judge names {named.mean():.1%} of {len(named)} samples; {coloured.mean():.1%} have the right colour."
    )


STAGES = ["scorers", "autoencoder", "denoiser", "verdict"]


@click.option("--out", type=click.Path(path_type=Path), default=Path("pretrain/assets"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("pretrain"), show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--scorer-steps", default=2200, show_default=True, help="Steps of scorer and judge, 64 images each.")
@click.option("--critic-steps", default=2000, show_default=True, help="Steps of the critic, 64 images each.")
@click.option("--autoencoder-steps", default=4000, show_default=True, help="Steps of 16 images.")
@click.option("--framed-steps", default=4000, show_default=True, help="Denoiser steps on framed drawings, 64 each.")
@click.option("--denoiser-steps", default=2500, show_default=True, help="Denoiser steps on scattered ones, 64 each.")
@click.option("--steps", default=30, show_default=True, help="DDIM steps of the verdict's samples.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance of the verdict's samples.")
@click.option("--only", type=click.Choice(STAGES), help="Just this stage; the others' checkpoints must be there.")
def main(
    out: Path,
    work: Path,
    device: str,
    scorer_steps: int,
    critic_steps: int,
    autoencoder_steps: int,
    framed_steps: int,
    denoiser_steps: int,
    steps: int,
    guidance: float,
    only: str | None,
) -> None:
    """Rebuild the small model, its scorer, critic and judge from openly licensed artwork.

    The artwork comes from the npm registry, by name, at pinned versions (needs Node.js, and the extra
    `pip install -e .[pretrain]`). Every stage keeps a checkpoint in WORK and resumes from it. About 90 minutes on
    one CPU core; a GPU is used where there is one. Writes to OUT: model/ (a diffusers checkpoint folder in half
    precision, with its card and samples), scorer/, critic/, judge/. To replace what comes with the workbench:
    --out workbench/models/small/assets, then `python -m workbench.prefer --out workbench/models/small/assets/pairs`.
    """
    import torch
    from torch import nn

    from workbench.common.distributed import pick_device
    from workbench.models.small import artwork, recipe

    silence_transformers()
    place = pick_device(device)
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    wanted = [only] if only else STAGES
    made = {"autoencoder_steps": autoencoder_steps, "framed_steps": framed_steps, "denoiser_steps": denoiser_steps}
    if wanted == ["verdict"]:
        verdict(out, steps, guidance, made)
        return
    art = artwork.load(work / "artwork")

    if "scorers" in wanted:
        for kind in ("scorer", "judge"):
            classifier = recipe.new_classifier(kind).to(place)
            loss = recipe.classifier_loss(kind, classifier, art.framed, art.others, place)
            fit(kind, classifier, loss, work, steps=scorer_steps, lr=1e-3, ema_decay=0.998)
            classifier.half().save_pretrained(out / kind)
        critic = recipe.new_critic().to(place)
        fit(
            "critic",
            critic,
            recipe.critic_loss(critic, art.framed, place),
            work,
            steps=critic_steps,
            lr=1e-3,
            ema_decay=0.998,
        )
        critic.half().save_pretrained(out / "critic")

    if "autoencoder" in wanted or "denoiser" in wanted:
        vae = recipe.new_autoencoder().to(place)
        loss = recipe.autoencoder_loss(vae, art.framed, art.others, place)
        fit("autoencoder", vae, loss, work, steps=autoencoder_steps, lr=2e-3, ema_decay=0.998)

    if "denoiser" in wanted:
        tokenizer, text_encoder = recipe.new_text_encoder(work / "tokenizer")
        model = nn.ModuleDict({"unet": recipe.new_unet(), "text_encoder": text_encoder}).to(place)
        scaling_factor = 0.0
        for name, drawings, count, lr in (  # first what things look like, then anywhere and of any size
            ("denoiser-framed", recipe.shifted(art.framed), framed_steps, 1.5e-3),
            ("denoiser", art.scattered, denoiser_steps, 1e-3),
        ):
            latents, captions = recipe.all_latents(vae, drawings, place)
            scaling_factor = scaling_factor or 1 / latents.std().item()
            loss = recipe.denoiser_loss(model, tokenizer, latents * scaling_factor, captions, place)
            model.requires_grad_(True)
            fit(name, model, loss, work, steps=count, lr=lr, ema_decay=0.999)
        save_model(out / "model", vae, model["text_encoder"], tokenizer, model["unet"], scaling_factor)

    if "verdict" in wanted:
        verdict(out, steps, guidance, made)


main = command(main)

if __name__ == "__main__":
    main()
