"""The report of a study: the notebooks executed on it, gathered on one page, attached to its run in MLflow."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from papermill import execute_notebook, inspect_notebook
from papermill.exceptions import PapermillExecutionError

from workbench import tracking
from workbench.common.errors import Failure, UserError, one_line
from workbench.common.outputs import output_file, require_own
from workbench.common.paths import shipped
from workbench.common.validation import study_address, writable_folder
from workbench.studies import tuning
from workbench.tracking import study_runs
from workbench.training.config import parse_override

NOTEBOOKS = shipped("notebooks")

#: Names of the studies that `python -m workbench.claims` runs beside the one that people look at.
HELPER_STUDIES = re.compile(f".*{tuning.HELPERS}")

#: Order of the notebooks on the page, the paper's; others follow by name.
ORDER = ("methods", "divergence", "tradeoff", "parts", "imbalance", "intervals", "timesteps", "alternatives", "search")


def make_report(
    study: str | None, out: Path, only: Sequence[str], parameters: Sequence[str], say: Callable[[str], object]
) -> tuple[str, Path]:
    """Execute the notebooks on a study, write them and one page of them all, and attach the folder to the study.

    Notebooks that need runs which the study lacks are skipped, unless they are asked for by name.

    Args:
        study: None = the newest that is no helper of the claims'.
        out: gets a folder of the study's name.
        only: names of notebooks; empty = all.
        parameters: texts NAME=VALUE, each for every notebook that has it.
        say: is given a line of progress at a time.
    Returns:
        The study's name and the page.
    Raises:
        UserError: no such study, notebook or parameter, or the study lacks what the notebooks need.
        Failure: a notebook failed.
    """
    notebooks = _chosen_notebooks(only)
    values = _chosen_parameters(notebooks, parameters)
    study = _chosen_study(study)
    folder = writable_folder("--out", out / study)
    # Asked now and not after the notebooks, which take minutes.
    require_own(folder, "report.html", *(f"{name}.ipynb" for name in notebooks))
    executed: dict[str, NotebookNode] = {}
    skipped: dict[str, str] = {}
    for name, path in notebooks.items():
        say(f"{name}: executing ...")
        try:
            own = {"study": study, "out": str(folder.resolve())}
            executed[name] = execute(path, folder / f"{name}.ipynb", values[name] | own)
        except UserError as error:
            if only:
                raise
            skipped[name] = str(error)
            say(f"{name}: skipped ({error})")
    if not executed:
        raise UserError(f"study {study!r} lacks runs that the notebooks need")
    claims = folder / "claims.md"
    head = heading(study, executed, skipped, claims.read_text(encoding="utf-8") if claims.is_file() else "")
    with output_file(folder / "report.html") as partial:
        partial.write_text(page(head, executed), encoding="utf-8")
    tracking.attach(study, folder)
    return study, folder / "report.html"


def _chosen_notebooks(only: Sequence[str]) -> dict[str, Path]:
    """The notebooks by name, in the page's order."""

    def place(path: Path) -> tuple[int, str]:
        return ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem

    available = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"), key=place)}
    for name in only:
        if name not in available:
            raise UserError(f"--notebook {name}: expected one of {', '.join(available)}")
    return {name: path for name, path in available.items() if not only or name in only}


def _chosen_parameters(notebooks: Mapping[str, Path], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The given parameters that each notebook has."""
    given = dict(parse_override(text) for text in texts)
    for name in ("study", "out"):
        if name in given:
            raise UserError(f"--parameter {name}: use --{name}")
    declared = declared_parameters(notebooks, given)
    return {name: {key: given[key] for key in given if key in declared[name]} for name in notebooks}


def declared_parameters(notebooks: Mapping[str, Path], given: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parameters that each notebook declares; papermill itself would only warn of one that none has.

    Raises:
        UserError: no notebook has a given one.
    """
    declared = {name: list(inspect_notebook(str(path))) for name, path in notebooks.items()}
    every = dict.fromkeys(key for keys in declared.values() for key in keys)
    for key in given:
        if key not in every:
            raise UserError(f"--parameter {key}: no notebook has it; {', '.join(notebooks)} have {', '.join(every)}")
    return declared


def _chosen_study(study: str | None) -> str:
    """The study of that name, or the newest that is no helper."""
    client = tracking.connect()
    studies = study_runs.study_names(client)
    if study is None and not studies:
        raise UserError("no study yet; run python -m workbench.sweep first")
    # `study_names` lists the one last worked on first.
    study = study or next((name for name in studies if not HELPER_STUDIES.fullmatch(name)), studies[0])
    study_runs.require_study(client, study_address(study))
    return study


class OwnKernels(AsyncKernelManager):
    """Starts kernels of the interpreter that runs now.

    A notebook names its kernel, `python3`, and so does every other environment's: the first one on Jupyter's path may
    be of an interpreter that has no workbench.
    """

    @property
    def kernel_spec(self) -> KernelSpec:
        """How a kernel of this interpreter is started."""
        return KernelSpec(argv=make_ipkernel_cmd(), display_name="Python 3 (ipykernel)", language="python")


def execute(path: Path, target: Path, parameters: Mapping[str, Any]) -> NotebookNode:
    """Execute one notebook in a process of its own and keep the executed one.

    Args:
        target: where the executed notebook is written; relative paths in it are of the working folder.
    Raises:
        UserError: the study lacks what the notebook needs, or a parameter is wrong; nothing is kept.
        Failure: a cell failed, or the kernel; names the error and where the notebook with its traceback lies.
    """
    quiet = ["--IPKernelApp.log_level=ERROR"]  # it warns that this machine's own traffic is not encrypted
    with TemporaryDirectory() as place:
        executed = Path(place) / target.name  # papermill writes it anew after each cell
        try:
            notebook = execute_notebook(
                str(path),
                str(executed),
                dict(parameters),
                progress_bar=False,
                log_output=False,
                extra_arguments=quiet,
                kernel_manager_class=OwnKernels,
            )
        except PapermillExecutionError as error:
            if error.ename == "UserError":
                raise UserError(error.evalue) from None
            with output_file(target) as partial:
                copyfile(executed, partial)
            raise Failure(f"notebook {path.stem}: {error.ename}: {error.evalue} (see {target})") from None
        except RuntimeError as error:  # the kernel did not start, or died: nbclient and jupyter_client raise this alone
            raise Failure(
                f"notebook {path.stem}: {one_line(error)}; does `{shlex.join(make_ipkernel_cmd()[:3])} --version` work?"
            ) from None
        with output_file(target) as partial:
            copyfile(executed, partial)
    return notebook


def heading(study: str, executed: Mapping[str, NotebookNode], skipped: Mapping[str, str], claims: str) -> str:
    """The page's first part in Markdown: its title, the table of claims, links to the notebooks.

    Args:
        executed: notebooks by name.
        skipped: name of a notebook -> why it is not shown.
        claims: Markdown; empty = there is no such table.
    """
    links = [f"- [{_title(notebook)}](#{name})" for name, notebook in executed.items()]
    links += [f"- *{name}*: not shown ({reason})" for name, reason in skipped.items()]
    parts = [f"# Report on study {study}", claims.strip(), "## Figures and tables", "\n".join(links)]
    return "\n\n".join(part for part in parts if part)


def _title(notebook: NotebookNode) -> str:
    return _first_line(next(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))


def page(head: str, notebooks: Mapping[str, NotebookNode]) -> str:
    """A heading in Markdown and executed notebooks, without their code, as one HTML page that needs no network."""
    cells = [new_markdown_cell(head)]
    for name, notebook in notebooks.items():
        cells.append(new_markdown_cell(f'<a id="{name}"></a>'))
        cells += [cell for cell in notebook.cells if cell.cell_type == "markdown" or cell.outputs]
    kernel = next(iter(notebooks.values())).metadata.kernelspec
    whole = new_notebook(cells=cells, metadata={"kernelspec": kernel, "title": _first_line(head)})
    # Left as they are, these load scripts from the network when the page is opened.
    scripts = ("mathjax_url", "require_js_url", "mermaid_js_url", "mermaid_layout_elk_js_url", "jquery_url")
    exporter = HTMLExporter(
        **dict.fromkeys(scripts, ""), exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    exporter.log.setLevel("ERROR")  # it warns of every picture without an alternative text
    return exporter.from_notebook_node(whole)[0]


def _first_line(markdown: str) -> str:
    return markdown.splitlines()[0].lstrip("# ")
