"""`python -m workbench.export_lora`: trained adapters as a file that other programs read."""

from pathlib import Path

import click

from workbench.common.command_line import command


@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="FILE.safetensors", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    type=click.Choice(["kohya", "diffusers"]),
    default="kohya",
    show_default=True,
    help="Names of the tensors.",
)
def main(source: str, target: Path, layout: str) -> None:
    """Write trained LoRA weights so that ComfyUI, A1111 and diffusers all draw alike with them.

    SOURCE is a folder or file that training wrote, or runs:/RUN_ID (a tracked run that kept its weights). What training
    writes says in its metadata by how much the update is scaled (alpha / rank), which programs other than diffusers do
    not read.

    kohya: the names of sd-scripts, with a tensor of alpha beside each layer; for UNets (SD1.x, SD2.x, SDXL).
    diffusers: the same names as training's, with the scale multiplied into the weights; for every family.

    \b
    Examples:
      python -m workbench.export_lora trained/ ~/ComfyUI/models/loras/mine.safetensors
      python -m workbench.export_lora runs:/RUN_ID mine.safetensors --format diffusers
    """
    from workbench.models.lora_export import export

    folder = Path(source)
    if source.startswith("runs:/"):
        from workbench import tracking

        _, folder = tracking.kept_model(tracking.connect_to_read(), source.removeprefix("runs:/"))
    export(folder, target, layout)
    click.echo(f"Written: {target}")


main = command(main)

if __name__ == "__main__":
    main()
