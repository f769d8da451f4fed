"""`python -m workbench.push`: put a trained model on the Hugging Face hub, with a model card."""

from pathlib import Path

import click

from workbench.common.command_line import command


@click.argument("source", metavar="SOURCE")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--base", default="", metavar="ID", help="Hub id of the model that training began with, for the card.")
@click.option("--public", is_flag=True, help="Make the repository public. Default: private.")
@click.option("--update", is_flag=True, help="Add a commit to a repository that is there already.")
@click.option("--dry-run", is_flag=True, help="Show the card and the files, and upload nothing.")
def main(source: str, repository: str, base: str, public: bool, update: bool, dry_run: bool) -> None:
    """Upload a trained model or LoRA weights, with a model card that says how they were made.

    SOURCE is a folder that training wrote, or runs:/RUN_ID (a tracked run that kept its weights), whose settings the
    card then lists. Nothing is uploaded by any other command. A README.md in the folder is taken in place of the card.
    Log in first: `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      python -m workbench.push trained/ ME/sd15-dpo --base stable-diffusion-v1-5/stable-diffusion-v1-5 --dry-run
      python -m workbench.push runs:/RUN_ID ME/sd15-dpo
    """
    from workbench.models import hub_upload

    folder, settings = Path(source), {}
    if source.startswith("runs:/"):
        from workbench import tracking
        from workbench.training.config import changed

        made, folder = tracking.kept_model(tracking.connect(), source.removeprefix("runs:/"))
        # Paths of this machine are nobody else's business.
        settings = {name: value for name, value in changed(made).items() if not Path(value).exists()}
        base = base or made.get("model.path", "")
    card, files = hub_upload.card(folder, repository, base, settings), hub_upload.files_of(folder)
    if dry_run:
        click.echo(card)
        click.echo("\n".join(f"{path.stat().st_size / 1e6:10.3f} MB  {name}" for name, path in files.items()))
        return
    click.echo(f"Uploaded: {hub_upload.upload(folder, repository, card, public=public, update=update)}")


main = command(main)

if __name__ == "__main__":
    main()
