"""`python -m workbench.report`: execute the notebooks on a study, gather them on one page, attach all to the study."""

from pathlib import Path

import click

from workbench.common.command_line import command


@click.option("--study", metavar="NAME", help="The study to report on. Default: the newest.")
@click.option("--notebook", "chosen", multiple=True, metavar="NAME", help="Only this notebook. Repeatable.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True, help="Folder of STUDY/."
)
@click.option(
    "-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A notebook's parameter. Repeatable."
)
def main(study: str | None, chosen: tuple[str, ...], out: Path, parameters: tuple[str, ...]) -> None:
    """Execute the notebooks on a study: one page, OUT/STUDY/report.html, beside the figures, tables and notebooks.

    The page needs no network and no other file. It begins with what came out: the best arm against Diffusion-DPO,
    pictures before and after, every trial, settings and versions, and OUT/STUDY/claims.md where there is one. Notebooks
    whose runs the study lacks are named last, unless --notebook asks for them. With --notebook the other parts of an
    earlier page stay. All is also attached to the study's run in MLflow.

    A parameter goes to every notebook that has it; `papermill --help-notebook notebooks/divergence.ipynb` lists a
    notebook's.

    \b
    Examples:
      python -m workbench.report
      python -m workbench.report --study default --notebook divergence -p smoothing=3 -p formats=pdf
    """
    # Imported here, so that --help does not wait for it.
    from workbench.analysis.report import make_report

    study, page, attached = make_report(study, out, chosen, parameters, say=click.echo)
    click.echo(f"Page:      {page}")
    if attached:
        click.echo(f"Attached:  study {study!r} in MLflow, under artifacts/figures")


main = command(main)

if __name__ == "__main__":
    main()
