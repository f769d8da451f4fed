"""The stages of `python -m workbench.pretrain`, each resumable: networks on images, autoencoder, denoiser, verdict."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, nn

from workbench.common.contact_sheet import contact_sheet
from workbench.common.errors import UserError
from workbench.models.small import image_models, quality
from workbench.models.small.artwork import Artwork
from workbench.models.small.autoencoder import autoencoder_loss, latent_pool, new_autoencoder, psnr
from workbench.models.small.denoiser import denoiser_loss, every_caption, new_text_encoder, new_unet, save_model
from workbench.models.small.fit import fit, half_of, write
from workbench.models.small.prompts import probes, split
from workbench.models.small.reward import ImageModel

EARLY = (0.2, 0.5)  #: shares of the denoiser's training after which it is kept, to draw pairs with


def image_model(kind: str, art: Artwork, work: Path, out: Path, *, steps: int, batch: int) -> dict[str, float]:
    """Train the scorer, the judge or the critic, and write it to `out` in half precision.

    Returns:
        Its accuracy and calibration error, or its mean errors, on poses that no network was trained on.
    """
    device = art.clutter.device
    model = (image_models.new_critic() if kind == "critic" else image_models.new_classifier(kind)).to(
        device, memory_format=torch.channels_last
    )
    draw = image_models.posed(art) if kind == "critic" else image_models.labelled(kind, art)
    lr, muon = (1.5e-3, 0.01) if kind == "judge" else (2e-3, 0.02)
    fit(kind, model, image_models.image_loss(model, draw, batch), work, steps=steps, lr=lr, muon=muon, ema_decay=0.998)
    # Statistics before temperature: the temperature must fit the logits of the network as it is saved.
    image_models.settle(model, draw, batch, batches=48 if device.type == "cuda" else 8)
    if kind == "critic":
        report = quality.critic_report(model, art, device)
    else:
        quality.calibrate(model, art, device)
        report = quality.classifier_report(model, art, device)
    model.half().save_pretrained(out)
    return {name: value for name, value in report.items() if isinstance(value, float)}


def autoencoder(art: Artwork, work: Path, scorer: Path, *, steps: int, batch: int) -> float:
    """Train the autoencoder; its weights stay in `work`.

    Args:
        scorer: folder of the scorer, whose features the loss compares.
    Returns:
        Mean PSNR of held-out drawings, in dB.
    """
    device = art.clutter.device
    if not (scorer / "config.json").exists():
        raise UserError(f"{scorer}: no scorer there; run the stage scorer first")
    # Initial weights come from torch's own generator; batches have generators of their own, see `fit`.
    torch.manual_seed(10)
    vae = new_autoencoder().to(device)
    loss = autoencoder_loss(vae, ImageModel(scorer, device).model, art, batch)
    fit("autoencoder", vae, loss, work, steps=steps, lr=1.5e-3, muon=0.02)
    write(half_of(vae), work / "autoencoder-final.pt")
    return psnr(vae, quality.held_out_images(art)).mean().item()


def denoiser(art: Artwork, work: Path, out: Path, *, steps: int, batch: int, pool: int) -> None:
    """Train the denoiser and its text encoder, and write the checkpoint folder: to `out`, and what was kept early."""
    device = art.clutter.device
    if not (work / "autoencoder-final.pt").exists():
        raise UserError(f"{work}: no autoencoder there; run the stage autoencoder first")
    vae = new_autoencoder()
    vae.load_state_dict(_full(work / "autoencoder-final.pt"))
    vae = vae.to(device).eval().requires_grad_(False)
    latents, caption = latent_pool(vae, art, pool, Generator(device).manual_seed(10**9))
    # Latents of unit variance, as the noise has: that is what the schedule assumes.
    scale = 1 / latents[:20_000].float().std().item()
    torch.manual_seed(11)
    tokenizer, text_encoder = new_text_encoder(work / "tokenizer")
    tokens = tokenizer([*every_caption(), ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    model = nn.ModuleDict({"unet": new_unet(), "text_encoder": text_encoder}).to(device)
    loss = denoiser_loss(model, tokens.to(device), latents, caption, scale, batch)
    fit("denoiser", model, loss, work, steps=steps, lr=1.5e-3, muon=0.01, ema_decay=0.9995, keep=EARLY)
    save_model(out, vae.cpu(), model.cpu(), tokenizer, scale)
    for share in EARLY:
        percent = round(100 * share)
        model.load_state_dict(_full(work / f"denoiser-{percent}.pt"))
        save_model(work / f"model-{percent}", vae, model, tokenizer, scale)


def verdicts(
    folder: Path, *, steps: int, guidance: float, device: torch.device, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Judge samples of the test prompts and of concepts in a style that they were never seen in; draw the probes.

    Writes verdict.json, samples.png (the test prompts) and probes.png to `folder`.

    Args:
        limit: prompts of each set.
    """
    found = {}
    for name in ("test", "unseen"):
        captions = [str(p) for p in split()[name]][:limit]
        found[name], images = quality.verdict(folder, captions, steps=steps, guidance=guidance, device=device)
        if name == "test":
            Image.fromarray(contact_sheet(images, columns=16, zoom=2)).save(folder / "samples.png", optimize=True)
    verdict = json.dumps({"steps": steps, "guidance": guidance} | found, indent=1)
    (folder / "verdict.json").write_text(f"{verdict}\n", encoding="utf-8")
    captions = [c for each in probes().values() for c in each][:limit]
    images = quality.draw(folder / "model", captions, steps=steps, guidance=guidance, device=device)
    Image.fromarray(contact_sheet(images, columns=12, zoom=2)).save(folder / "probes.png", optimize=True)
    return found


def _full(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict that was kept in half precision, as float32."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
