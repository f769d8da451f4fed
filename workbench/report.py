"""`python -m workbench.report`: execute the notebooks on a study and attach their figures to it."""

from pathlib import Path

import click

from workbench.cli import command

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@click.option("--study", metavar="NAME", help="The study to report on. Default: the newest.")
@click.option("--notebook", "chosen", multiple=True, metavar="NAME", help="Only this notebook. Repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
@click.option(
    "-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A notebook's parameter. Repeatable."
)
def main(study: str | None, chosen: tuple[str, ...], out: Path, parameters: tuple[str, ...]) -> None:
    """Execute the notebooks on a study: executed notebooks, HTML pages and figures under OUT/STUDY/.

    The figures are also attached to the study's run in MLflow. Parameters that a notebook does not have are
    errors; `papermill --help-notebook notebooks/divergence.ipynb` lists those it has.

    \b
    Examples:
      python -m workbench.report
      python -m workbench.report --study default --notebook divergence -p smoothing=3 -p formats=pdf
    """
    from workbench import tracking
    from workbench.config import parse_override
    from workbench.errors import UserError

    available = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    unknown = [name for name in chosen if name not in available]
    if unknown:
        raise UserError(f"--notebook {unknown[0]}: expected one of {', '.join(available)}")
    given = dict(parse_override(text) for text in parameters)
    for name in ("study", "out"):
        if name in given:
            raise UserError(f"--parameter {name}: use --{name}")
    client = tracking.connect()
    names = tracking.studies(client)
    if study is None and not names:
        raise UserError("no study yet; run python -m workbench.sweep first")
    study = study or names[0]
    tracking.require_study(client, study)
    folder = out / study
    plan = {name: path for name, path in available.items() if not chosen or name in chosen}
    for name, path in plan.items():
        _check_parameters(name, path, given)
    for name, path in plan.items():
        click.echo(f"{name}: executing ...")
        for file in _execute(name, path, folder, {"study": study, "out": str(folder.resolve())} | given):
            click.echo(f"  {file}")
    tracking.attach(study, folder)
    click.echo(f"Attached to study {study!r} in MLflow, under artifacts/figures.")


def _check_parameters(name: str, path: Path, given: dict) -> None:
    from papermill import inspect_notebook

    from workbench.errors import UserError

    known = inspect_notebook(str(path))
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(f"--parameter {unknown[0]}: notebook {name} has only {', '.join(known)}")


def _execute(name: str, path: Path, folder: Path, parameters: dict) -> list[Path]:
    """Run one notebook and export it as a page that needs no network; returns the files written.

    Raises:
        Failure: a cell failed; names the error and where the notebook with its traceback lies.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from workbench.errors import Failure

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.ipynb"
    try:
        execute_notebook(str(path), str(target), parameters, progress_bar=False, log_output=False)
    except PapermillExecutionError as error:
        raise Failure(f"notebook {name}: {error.ename}: {error.evalue} (see {target})") from None
    scripts = ("mathjax_url", "require_js_url", "mermaid_js_url", "mermaid_layout_elk_js_url", "jquery_url")
    exporter = HTMLExporter(**dict.fromkeys(scripts, ""), exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.log.setLevel("ERROR")  # it warns of every picture without a text of its own
    page, _ = exporter.from_notebook_node(nbformat.read(target, as_version=4))
    target.with_suffix(".html").write_text(page)
    return [
        target,
        target.with_suffix(".html"),
        *sorted(folder.glob(f"{name}*.png")),
        *sorted(folder.glob(f"{name}*.svg")),
    ]


main = command(main)

if __name__ == "__main__":
    main()
