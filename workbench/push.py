"""`python -m workbench.push`: put a trained model on the Hugging Face hub, with a model card."""

from contextlib import suppress
from pathlib import Path

import click

from workbench.common.command_line import command
from workbench.common.errors import UserError


@click.argument("source", metavar="SOURCE")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--base", default="", metavar="ID", help="Hub id of the model that training began with, for the card.")
@click.option("--public", is_flag=True, help="Make the repository public. Default: private.")
@click.option("--update", is_flag=True, help="Add a commit to a repository that is there already.")
@click.option("--dry-run", is_flag=True, help="Show the card and the files, and upload nothing.")
def main(source: str, repository: str, base: str, public: bool, update: bool, dry_run: bool) -> None:
    """Upload a trained model or LoRA weights, with a model card that says how they were made.

    SOURCE is a folder that training wrote, or runs:/RUN_ID (a tracked run that kept its weights), whose settings the
    card then lists, without paths. A run keeps its denoiser or LoRA weights alone: its card says how they are loaded
    into the model that training began with. Nothing is uploaded by any other command. A README.md in the folder is
    taken in place of the card. Log in first: `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      python -m workbench.push trained/ ME/sd15-dpo --base stable-diffusion-v1-5/stable-diffusion-v1-5 --dry-run
      python -m workbench.push runs:/RUN_ID ME/sd15-dpo
    """
    from workbench.models import hub_upload

    hub_upload.require_name(repository)
    folder, settings = Path(source), {}
    if base:
        close = hub_upload.close_name(base, _trained_models())
        hub_upload.require_name(base, "--base", close)
        if close:  # no mistake for sure: somebody may have a model of such a name
            click.echo(f"Note: --base {base}: no experiment here begins with it; did you mean {close}?", err=True)
    if source.startswith("runs:/"):
        from workbench import tracking
        from workbench.training.config import changed
        from workbench.training.provenance import without_places

        made, folder = tracking.kept_model(tracking.connect_to_read(), source.removeprefix("runs:/"))
        settings = without_places(changed(made))
        if made.get("model.vae"):
            settings.setdefault("model.vae", hub_upload.UNNAMED)
        base = base or settings.get("model.path", "")
    files = hub_upload.files_of(folder)
    card = hub_upload.card(folder, repository, base, settings)
    if dry_run:
        own = files.get(hub_upload.CARD)
        click.echo(own.read_text(encoding="utf-8", errors="replace") if own else card)
        click.echo("\n".join(f"{path.stat().st_size / 1e6:10.3f} MB  {name}" for name, path in files.items()))
        return
    click.echo(f"Uploaded: {hub_upload.upload(folder, repository, card, public=public, update=update)}")


def _trained_models() -> list[str]:
    """The models of the experiment files that are there; one that cannot be read is no matter of this command."""
    from workbench.common.paths import shipped
    from workbench.training.experiment_file import read

    found = []
    for file in sorted(shipped("experiments").glob("*.toml")):
        with suppress(UserError):
            found.append(str(read(file).get("model.path", "")))
    return found


main = command(main)

if __name__ == "__main__":
    main()
