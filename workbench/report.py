"""`python -m workbench.report`: execute the notebooks on a study, gather them on one page, attach all to the study."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workbench.common.command_line import command
from workbench.common.paths import shipped
from workbench.common.validation import study_name, writable_folder

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = shipped("notebooks")

HELPERS = ("-tuning", "-checks")  #: studies that `python -m workbench.claims` runs beside the one to look at

#: Order of the notebooks on the page, the paper's; others follow by name.
ORDER = ("methods", "divergence", "imbalance", "intervals", "timesteps", "alternatives", "search")


@click.option("--study", metavar="NAME", help="The study to report on. Default: the newest.")
@click.option("--notebook", "chosen", multiple=True, metavar="NAME", help="Only this notebook. Repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
@click.option(
    "-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A notebook's parameter. Repeatable."
)
def main(study: str | None, chosen: tuple[str, ...], out: Path, parameters: tuple[str, ...]) -> None:
    """Execute the notebooks on a study: one page, OUT/STUDY/report.html, beside the figures, tables and notebooks.

    The page needs no network and no other file. It begins with OUT/STUDY/claims.md where there is one. Notebooks whose
    arms the study lacks are skipped, unless --notebook names them. All is also attached to the study's run in MLflow.

    A parameter goes to every notebook that has it; `papermill --help-notebook notebooks/divergence.ipynb` lists a
    notebook's.

    \b
    Examples:
      python -m workbench.report
      python -m workbench.report --study default --notebook divergence -p smoothing=3 -p formats=pdf
    """
    from workbench import tracking
    from workbench.common.errors import UserError
    from workbench.tracking import study_runs
    from workbench.training.config import parse_override

    available = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"), key=_place)}
    unknown = [name for name in chosen if name not in available]
    if unknown:
        raise UserError(f"--notebook {unknown[0]}: expected one of {', '.join(available)}")
    given = dict(parse_override(text) for text in parameters)
    for name in ("study", "out"):
        if name in given:
            raise UserError(f"--parameter {name}: use --{name}")
    client = tracking.connect()
    studies = study_runs.study_names(client)
    if study is None and not studies:
        raise UserError("no study yet; run python -m workbench.sweep first")
    study = study or next((name for name in studies if not name.endswith(HELPERS)), studies[0])
    study_runs.require_study(client, study_name(study))
    plan = {name: path for name, path in available.items() if not chosen or name in chosen}
    known = known_parameters(plan, given)
    folder = writable_folder("--out", out / study)
    own = {"study": study, "out": str(folder.resolve())}
    executed: dict[str, NotebookNode] = {}
    skipped: dict[str, str] = {}
    for name, path in plan.items():
        click.echo(f"{name}: executing ...")
        try:
            executed[name] = _execute(
                name, path, folder, own | {key: given[key] for key in given if key in known[name]}
            )
        except UserError as error:
            if chosen:
                raise
            skipped[name] = str(error)
            click.echo(f"{name}: skipped ({error})")
    if not executed:
        raise UserError(f"study {study!r} lacks runs that the notebooks need")
    claims = folder / "claims.md"
    head = heading(study, executed, skipped, claims.read_text() if claims.exists() else "")
    (folder / "report.html").write_text(page(head, executed))
    tracking.attach(study, folder)
    click.echo(f"Page:      {folder / 'report.html'}")
    click.echo(f"Attached:  study {study!r} in MLflow, under artifacts/figures")


def _place(path: Path) -> tuple[int, str]:
    return ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem


def known_parameters(plan: dict[str, Path], given: dict[str, Any]) -> dict[str, list[str]]:
    """The parameters of each notebook.

    Raises:
        UserError: no notebook has a given one.
    """
    from papermill import inspect_notebook

    from workbench.common.errors import UserError

    known = {name: list(inspect_notebook(str(path))) for name, path in plan.items()}
    every = dict.fromkeys(key for keys in known.values() for key in keys)
    for key in given:
        if key not in every:
            raise UserError(f"--parameter {key}: no notebook has it; {', '.join(plan)} have {', '.join(every)}")
    return known


def _execute(name: str, path: Path, folder: Path, parameters: dict[str, Any]) -> "NotebookNode":
    """Run one notebook; the executed one is kept in the folder, with its figures, and returned.

    Raises:
        UserError: the study lacks what the notebook needs, or a parameter is wrong; nothing is kept.
        Failure: a cell failed; names the error and where the notebook with its traceback lies.
    """
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from workbench.common.errors import Failure, UserError

    target = folder / f"{name}.ipynb"
    quiet = ["--IPKernelApp.log_level=ERROR"]  # it warns that this machine's own traffic is not encrypted
    try:
        return execute_notebook(
            str(path), str(target), parameters, progress_bar=False, log_output=False, extra_arguments=quiet
        )
    except PapermillExecutionError as error:
        if error.ename == "UserError":
            target.unlink()
            raise UserError(error.evalue) from None
        raise Failure(f"notebook {name}: {error.ename}: {error.evalue} (see {target})") from None


def heading(study: str, executed: dict[str, "NotebookNode"], skipped: dict[str, str], claims: str) -> str:
    """What stands above the notebooks, in Markdown: title, claims, contents."""
    links = [f"- [{_title(notebook)}](#{name})" for name, notebook in executed.items()]
    links += [f"- *{name}*: not shown ({reason})" for name, reason in skipped.items()]
    parts = [f"# Report on study {study}", claims.strip(), "## Figures and tables", "\n".join(links)]
    return "\n\n".join(part for part in parts if part)


def _title(notebook: "NotebookNode") -> str:
    return next(cell.source for cell in notebook.cells if cell.cell_type == "markdown").splitlines()[0].lstrip("# ")


def page(head: str, notebooks: dict[str, "NotebookNode"]) -> str:
    """A heading and executed notebooks, by name, as one HTML page without code that needs no network."""
    from nbconvert import HTMLExporter
    from nbformat.v4 import new_markdown_cell, new_notebook

    cells = [new_markdown_cell(head)]
    for name, notebook in notebooks.items():
        cells.append(new_markdown_cell(f'<a id="{name}"></a>'))
        cells += [cell for cell in notebook.cells if cell.cell_type == "markdown" or cell.outputs]
    first = next(iter(notebooks.values()))
    whole = new_notebook(cells=cells, metadata={"kernelspec": first.metadata.kernelspec, "title": _plain(head)})
    scripts = ("mathjax_url", "require_js_url", "mermaid_js_url", "mermaid_layout_elk_js_url", "jquery_url")
    exporter = HTMLExporter(
        **dict.fromkeys(scripts, ""), exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    exporter.log.setLevel("ERROR")  # it warns of every picture without a text of its own
    return exporter.from_notebook_node(whole)[0]


def _plain(head: str) -> str:
    return head.splitlines()[0].lstrip("# ")


main = command(main)

if __name__ == "__main__":
    main()
