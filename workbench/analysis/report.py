"""The report of a study: what came out, then the notebooks executed on it, on one page, attached to its MLflow run."""

import re
import shlex
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from papermill import execute_notebook, inspect_notebook
from papermill.exceptions import PapermillExecutionError

from workbench import tracking
from workbench.analysis import needs, opening
from workbench.common.errors import Failure, UserError, one_line
from workbench.common.outputs import output_file, require_own, written_in
from workbench.common.paths import shipped
from workbench.common.secrets import hide_passwords
from workbench.common.validation import study_address, writable_folder
from workbench.studies import tuning
from workbench.tracking import study_runs
from workbench.tracking.overview import overview
from workbench.tracking.store import missing
from workbench.training.experiment_file import parse_override

NOTEBOOKS = shipped("notebooks")

#: Names of the studies that `python -m workbench.claims` runs beside the one that people look at.
HELPER_STUDIES = re.compile(f".*{tuning.HELPERS}")

MARK = "workbench_study"  #: in an executed notebook's metadata: id of the run of the study that it was executed on

#: Run by a notebook's kernel before its cells: the workbench's own warnings, such as that deleted runs are left out,
#: go to stdout, since they belong to the figures and the page leaves out what libraries say on stderr.
OWN_WARNINGS = 'import logging, sys; logging.getLogger("workbench").addHandler(logging.StreamHandler(sys.stdout))'

#: Order of the notebooks on the page: what rounds gained, then the paper's. Others come onto it only where they are
#: asked for, after these.
ORDER = (
    "rounds", "methods", "divergence", "tradeoff", "parts", "imbalance", "intervals", "timesteps", "alternatives",
    "search",
)  # fmt: skip


def make_report(
    study: str | None, out: Path, only: Sequence[str], parameters: Sequence[str], say: Callable[[str], object]
) -> tuple[str, Path, bool]:
    """Execute the notebooks on a study, write them and one page of them all, and attach the folder to the study.

    The page begins with what came out. Notebooks that need runs which the study lacks are skipped, unless they are
    asked for by name; the page ends with their reasons. Parts of the page that are not drawn anew stay as they are.

    Args:
        study: None = the newest that is no helper of the claims'.
        out: gets a folder of the study's name.
        only: names of notebooks; empty = those of ORDER.
        parameters: texts NAME=VALUE, each for every notebook that has it.
        say: is given a line of progress at a time.
    Returns:
        The study's name, the page, and whether all was attached: not to a study of another study database.
    Raises:
        UserError: no such study, notebook or parameter, or the study lacks what a notebook asked for needs.
        Failure: a notebook failed.
    """
    notebooks = _chosen_notebooks(only)
    values = _chosen_parameters(notebooks, parameters)
    if none := missing():
        raise UserError(none)
    study = _chosen_study(study)
    folder = writable_folder("--out", out / study)
    # Asked now and not after the notebooks, which take minutes.
    require_own(folder, "report.html", opening.PICTURE, *(f"{name}.ipynb" for name in notebooks))
    runs, about = tracking.load_runs(study), overview(tracking.connect(), study)
    executed: dict[str, NotebookNode] = {}
    skipped: dict[str, str] = {}
    for name, path in notebooks.items():
        try:
            needs.require(name, study, runs, values[name])
            say(f"{name}: executing ...")
            own = {"study": study, "out": str(folder.resolve())}
            executed[name] = execute(path, folder / f"{name}.ipynb", values[name] | own, study_run=about.run_id)
        except UserError as error:
            if only:
                raise
            skipped[name] = str(error)
            say(f"{name}: skipped ({error})")
    parts = _in_order(_kept(folder, about.run_id) | executed)
    claims = folder / "claims.md"
    verdicts = claims.read_text(encoding="utf-8") if claims.is_file() else ""
    head = heading(opening.opening(study, runs, about, folder), parts, verdicts)
    tail = closing({name: reason for name, reason in skipped.items() if name not in parts})
    with output_file(folder / "report.html") as partial:
        partial.write_text(page(head, parts, tail), encoding="utf-8")
    return study, folder / "report.html", tracking.attach(study, folder)


def _kept(folder: Path, study_run: str) -> dict[str, NotebookNode]:
    """Notebooks that were executed on the study before, by name; not those of a study that had its name before it."""
    found = {}
    for path in written_in(folder):
        if path.suffix == ".ipynb":
            with suppress(ValueError, OSError):  # one that somebody has edited into something else is no part
                notebook = nbformat.read(path, as_version=4)
                failed = notebook.metadata.get("papermill", {}).get("exception")
                if not failed and notebook.metadata.get(MARK, study_run) == study_run:
                    found[path.stem] = notebook
    return found


def _in_order(parts: Mapping[str, NotebookNode]) -> dict[str, NotebookNode]:
    return {name: parts[name] for name in sorted(parts, key=_place)}


def _place(name: str) -> tuple[int, str]:
    """Where on the page a notebook stands."""
    return ORDER.index(name) if name in ORDER else len(ORDER), name


def _chosen_notebooks(only: Sequence[str]) -> dict[str, Path]:
    """The notebooks by name, in the page's order."""
    available = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"), key=lambda path: _place(path.stem))}
    for name in only:
        if name not in available:
            raise UserError(f"--notebook {name}: expected one of {', '.join(available)}")
    return {name: path for name, path in available.items() if name in (only or ORDER)}


def _chosen_parameters(notebooks: Mapping[str, Path], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The parameters of each notebook: its defaults, or what is given."""
    given = dict(parse_override(text) for text in texts)
    for name in ("study", "out"):
        if name in given:
            raise UserError(f"--parameter {name}: use --{name}")
    declared = declared_parameters(notebooks, given)
    return {name: {key: given.get(key, default) for key, default in declared[name].items()} for name in notebooks}


def declared_parameters(notebooks: Mapping[str, Path], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters that each notebook declares, with their defaults; papermill would only warn of an unknown one.

    Raises:
        UserError: no notebook has a given one.
    """
    declared = {
        name: {key: literal_eval(about["default"]) for key, about in inspect_notebook(str(path)).items()}
        for name, path in notebooks.items()
    }
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
        raise UserError(f"no study yet in {hide_passwords(tracking.tracking_uri())}; run python -m workbench.sweep")
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


def execute(path: Path, target: Path, parameters: Mapping[str, Any], study_run: str = "") -> NotebookNode:
    """Execute one notebook in a process of its own and keep the executed one.

    Args:
        target: where the executed notebook is written; relative paths in it are of the working folder.
        study_run: id of the study's run, by which a later page knows whether the executed notebook is of its study.
    Raises:
        UserError: the study lacks what the notebook needs, or a parameter is wrong; nothing is kept.
        Failure: a cell failed, or the kernel; names the error and where the notebook with its traceback lies.
    """
    # The level: it warns that this machine's own traffic is not encrypted.
    options = ["--IPKernelApp.log_level=ERROR", f"--IPKernelApp.exec_lines={OWN_WARNINGS}"]
    with TemporaryDirectory() as place:
        executed = Path(place) / target.name  # papermill writes it anew after each cell
        try:
            notebook = execute_notebook(
                str(path),
                str(executed),
                dict(parameters),
                progress_bar=False,
                log_output=False,
                extra_arguments=options,
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
    notebook.metadata[MARK] = study_run
    with output_file(target) as partial:
        nbformat.write(notebook, partial)
    return notebook


def heading(first: str, parts: Mapping[str, NotebookNode], claims: str) -> str:
    """The page's first part in Markdown: what came out, the table of claims, links to the notebooks.

    Args:
        first: title and what came out.
        parts: executed notebooks by name.
        claims: Markdown; empty = there is no such table.
    """
    links = [f"- [{_title(notebook)}](#{name})" for name, notebook in parts.items()]
    sections = [first, claims.strip(), "## Figures and tables" if links else "", "\n".join(links)]
    return "\n\n".join(section for section in sections if section)


def closing(skipped: Mapping[str, str]) -> str:
    """The page's last part in Markdown: a line for each notebook that is not shown; empty where all are.

    Args:
        skipped: name of a notebook -> why it is not shown.
    """
    lines = [f"- *{name}*: {reason}" for name, reason in skipped.items()]
    return "\n\n".join(["## Not shown", "\n".join(lines)]) if lines else ""


def _title(notebook: NotebookNode) -> str:
    return _first_line(next(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))


def _without_notices(cell: NotebookNode) -> NotebookNode:
    """The cell without what libraries wrote to stderr, such as that a cache lies elsewhere; the notebook keeps it.

    The workbench's own warnings stay: `execute` sends them to stdout.
    """
    if cell.cell_type != "code":
        return cell
    found = [each for each in cell.outputs if each.get("name") != "stderr"]
    return NotebookNode({**cell, "outputs": found})


def page(head: str, notebooks: Mapping[str, NotebookNode], tail: str = "") -> str:
    """Markdown and executed notebooks, without their code, as one HTML page that needs no network.

    Args:
        head, tail: Markdown before and after the notebooks.
    """
    cells = [new_markdown_cell(head)]
    for name, notebook in notebooks.items():
        cells.append(new_markdown_cell(f'<a id="{name}"></a>'))
        shown = (_without_notices(cell) for cell in notebook.cells)
        cells += [cell for cell in shown if cell.cell_type == "markdown" or cell.outputs]
    cells += [new_markdown_cell(tail)] if tail else []
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
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
