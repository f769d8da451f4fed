"""The notebooks on a study of invented runs, and the page that gathers them."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import polars as pl
import pytest
from papermill import inspect_notebook

from tests.support import searched
from tests.support.commands import invoke
from tests.support.helpers import ROOT, workbench
from workbench import tracking
from workbench.analysis import report
from workbench.common.errors import Failure, UserError
from workbench.common.outputs import output_file
from workbench.common.validation import writable_folder
from workbench.tracking import study_runs

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
ARMS = tomllib.loads((ROOT / "experiments" / "claims.toml").read_text())["sweep"]["arms"]
CAPTIONS = [f"a {c} on a red background, {s} style" for c in ("fox", "car") for s in ("noto", "fluent", "twemoji")]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_thin_and_say_what_they_take(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert not any(
        isinstance(node, ast.FunctionDef | ast.For) for cell in code for node in ast.walk(ast.parse(cell.source))
    )
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    assigned = {node.target.id for node in ast.parse(parameters.source).body}
    known = inspect_notebook(str(NOTEBOOKS[name]))  # what papermill finds, which is less than Python does
    assert set(known) == assigned and {"study", "out"} <= assigned
    assert all(p["help"] and p["inferred_type_name"] in ("str", "int") for p in known.values())
    assert "**How to read it.**" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_every_notebook_has_its_place_on_the_page_but_the_one_to_begin_from():
    assert set(NOTEBOOKS) - set(report.ORDER) == {"explore"}
    assert set(report._chosen_notebooks([])) == set(report.ORDER) and [*report._chosen_notebooks(["explore"])]


def test_a_parameter_must_belong_to_a_notebook():
    plan = {name: NOTEBOOKS[name] for name in ("divergence", "imbalance")}
    known = report.declared_parameters(plan, {"smoothing": 3})
    assert "smoothing" in known["divergence"] and "smoothing" not in known["imbalance"]
    with pytest.raises(UserError, match="--parameter smooting: no notebook has it; divergence, imbalance have study, "):
        report.declared_parameters(plan, {"smooting": 3})


@pytest.mark.slow
def test_notebooks_are_executed_by_this_interpreter(tmp_path, monkeypatch):
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell("import sys; print(sys.executable)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "n.ipynb")
    done = report.execute(tmp_path / "n.ipynb", tmp_path / "done.ipynb", {})
    assert done.cells[-1].outputs[0].text.strip() == sys.executable
    monkeypatch.setattr(report, "make_ipkernel_cmd", lambda: spec["argv"])
    with pytest.raises(Failure, match="notebook n: Kernel died"):
        report.execute(tmp_path / "n.ipynb", tmp_path / "done.ipynb", {})


def invent(study: str, arms: list[str]) -> None:
    """A study of one tracked run an arm, with everything that a run keeps and nothing trained."""
    client = tracking.connect()
    parent = study_runs.open_group(client, study, "").info.run_id
    rng = np.random.default_rng(0)
    for arm in arms:
        settings = {"reference.policy": "threshold", "reference.interval": 8, "reference.delta": 0.005,
                    "objective.loss": "dpo", "objective.beta": 300, "timesteps.density": "uniform",
                    "reward_scale.shape": "constant", "seed": 0}  # fmt: skip
        settings |= {key: value for key, value in ARMS[arm].items() if "." in key}
        tags = {"workbench.arm": arm, "workbench.study": study, "workbench.kind": "trial"}
        tracker = tracking.Tracker(client, f"{arm}-s0", params=settings, tags=tags, parent=parent)
        numbers = (
            "rewards/margins",
            "validation/margin",
            "divergence/policy",
            "divergence/reference",
            "eval/reward",
            "eval/win_rate",
        )
        numbers += tuple(
            f"timestep_{quantity}/t{edge:03d}-{edge + 99:03d}"
            for quantity in ("loss", "reward_size", "accuracy", "lambda", "divergence")
            for edge in range(0, 1000, 100)
        )
        for step in (1, 2):
            tracker.log(step, dict(zip(numbers, rng.uniform(0.01, 1, len(numbers)).tolist(), strict=True)))
        rewards = rng.normal(-2, 1, (3, len(CAPTIONS)))
        columns = {"caption": CAPTIONS, "seed": [0] * len(CAPTIONS), "reward": rewards[0].tolist()}
        columns |= {"pretrained_reward": rewards[1].tolist()}
        if arm in ("ours", "frozen"):
            columns |= {"judge": rewards[2].tolist(), "pretrained_judge": rewards[1].tolist()}
        tracker.table("samples.json", columns)
        tracker.picture("samples.png", rng.integers(0, 256, (32, 32 * len(CAPTIONS), 3), dtype=np.uint8))
        tracker.close("complete")


def test_samples_and_sheets_come_back_as_they_were_tracked(workplace):
    invent("s", ["frozen", "kto"])
    runs = tracking.load_runs("s")
    samples = tracking.load_samples(runs)
    assert samples.columns == [
        "run_id", "name", "arm", "caption", "image_seed", "reward", "pretrained_reward", "judge", "pretrained_judge",
    ]  # fmt: skip
    assert samples["caption"].to_list() == CAPTIONS * 2
    judged = dict(samples.group_by("arm").agg(pl.col("judge").is_not_null().all()).iter_rows())
    assert judged == {arm: arm != "kto" for arm in judged} and len(judged) == 2
    assert {sheet.shape for sheet in tracking.load_sheets(runs).values()} == {(32, 32 * len(CAPTIONS), 3)}
    with pytest.raises(UserError, match="samples"):
        tracking.load_samples(runs.clear())


@pytest.mark.slow  # in every run: the notebooks' code in one process, in benchmarks/test_invented_study.py
def test_one_page_shows_all_figures_and_tables_of_a_study(workplace):
    invent("claims", list(ARMS))
    folder = workplace / "reports" / "claims"
    folder.mkdir(parents=True)
    (folder / "claims.md").write_text("# The claims\n\n| claim | verdict |\n| --- | --- |\n| first | holds |\n")
    done = workbench("workbench.report", "-p", "smoothing=2", "-p", "formats=png", cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    # Invented rewards have no parts, and the study has arms alone.
    assert re.findall(r"(\w+): skipped", done.stdout) == ["rounds", "parts", "search"]
    for name in ("methods", "methods-samples", "divergence", "divergence-score", "imbalance", "intervals", "timesteps"):
        assert (folder / f"{name}.png").stat().st_size > 10_000, name
    for name in ("methods-table", "timesteps-table", "alternatives-table"):
        assert "(paper, SD1.5)" in (folder / f"{name}.md").read_text(), name
    page = (folder / "report.html").read_text()
    assert "<td>holds</td>" in page and page.index("<td>holds</td>") < page.index("Fig. 1a")
    assert page.count("data:image/png;base64") >= 7 and "figures.save" not in page
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']+["']""", page) == []  # needs no other file
    assert not re.search(r"https?://(?:cdn|unpkg|cdnjs)", page)


STDERR = 'data-mime-type="application/vnd.jupyter.stderr"'


def attached(study: str) -> set[str]:
    client = tracking.connect()
    return {
        Path(a.path).name for a in client.list_artifacts(study_runs.require_study(client, study).info.run_id, "figures")
    }


def test_a_front_is_shown_with_what_there_are_too_few_trials_for(workplace):
    invent("s", ["frozen", "ours"])
    url = f"sqlite:///{workplace / 'optuna.db'}"
    searched.study(searched.BOTH, [searched.trial(1.0, 0.1, arm="frozen"), searched.trial(2.0, 0.2)], url, "s")
    done = invoke("report", "--notebook", "search", "-p", "formats=png")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (workplace / "reports" / "s" / "report.html").read_text()
    assert "Not shown: importance needs 8 complete trials of the space; the study has 2" in page
    assert "Not shown: intermediate values: no trial reported any" in page and page.count("Not shown") == 2
    assert page.count('src="data:image/png;base64') == 4 and "<td>0 (frozen)</td>" in page and STDERR not in page
    drawn = {f"search{part}.png" for part in ("", "-history", "-slices", "-parallel")}
    assert drawn | {"search-best.md"} <= attached("s")


@pytest.mark.slow
def test_a_budget_is_shown_with_what_mattered(workplace):
    invent("s", ["frozen"])
    url = f"sqlite:///{workplace / 'optuna.db'}"
    budget = searched.REWARD | {"sweep.constraints": {"divergence/policy": 0.02}}
    searched.grown(budget, 12, lambda lr, gamma, rng: lr, storage=url, name="s")
    done = invoke("report", "--notebook", "search", "-p", "formats=png")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (workplace / "reports" / "s" / "report.html").read_text()
    assert "Not shown: intermediate values: no trial reported any" in page and page.count("Not shown") == 1
    assert page.count('src="data:image/png;base64') == 5 and STDERR not in page
    drawn = {f"search{part}.png" for part in ("", "-history", "-importance", "-slices", "-parallel")}
    assert drawn | {"search-best.md"} <= attached("s")


def test_a_notebook_that_is_asked_for_must_have_its_arms(workplace):
    invent("s", ["frozen", "threshold"])
    asked = invoke("report", "--notebook", "methods", "-p", "arms=frozen,kto")
    assert asked.returncode == 2
    assert "arm 'kto': the study has no finished run of it, only of frozen, threshold" in asked.stderr
    assert not (workplace / "reports" / "s" / "methods.ipynb").exists()


def test_a_page_that_somebody_else_wrote_stays(workplace):
    invent("s", ["frozen"])
    page = workplace / "reports" / "s" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("years of work")
    done = invoke("report", "--study", "s")
    assert done.returncode == 2 and "report.html: is there, and not among the files that the" in done.stderr
    assert page.read_text() == "years of work"


def test_a_study_may_be_named_with_its_token(workplace):
    invent("s", ["frozen"])
    invent("s-checks", ["frozen"])
    client = tracking.connect()
    run = study_runs.require_study(client, "s").info.run_id
    for name in ("s", f"s@{run[:8]}"):
        assert report._chosen_study(name) == name
    for name, message in (("s@../../etc", "after the '@' comes a study's token"), ("../s@abc", "use up to 100 let")):
        with pytest.raises(UserError, match=message):
            report._chosen_study(name)


def test_only_what_the_workbench_wrote_is_attached(workplace):
    invent("s", ["frozen"])
    folder = workplace / "reports" / "s"
    with output_file(writable_folder("--out", folder) / "claims.md") as path:
        path.write_text("| a |", encoding="utf-8")
    (folder / "private.txt").write_text("years of work")
    tracking.attach("s", folder)
    assert attached("s") == {"claims.md"}


def test_the_page_begins_with_what_came_out_and_ends_with_what_it_leaves_out():
    notebook = nbformat.read(NOTEBOOKS["divergence"], as_version=4)
    head = report.heading("# Report on study s", {"divergence": notebook}, "## Claims\n\n| a |\n")
    assert head.index("# Report on study s") < head.index("| a |") < head.index("- [Margin and divergence")
    tail = report.closing({"methods": "arm 'kto': none"})
    assert "(#divergence)" in head and "- *methods*: arm 'kto': none" in tail and report.closing({}) == ""
    page = report.page(head, {"divergence": notebook}, tail)
    assert page.index("Report on study s") < page.index("Margin and divergence over") < page.index("arm 'kto': none")


def test_what_libraries_say_of_the_machine_is_not_on_the_page():
    said = [nbformat.v4.new_output("stream", name=name, text=f"{name} says") for name in ("stderr", "stdout")]
    cells = [nbformat.v4.new_markdown_cell("# A figure"), nbformat.v4.new_code_cell("1", outputs=said)]
    notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell("2", outputs=said[:1])])
    page = report.page("# Report", {"a": notebook})
    assert "stdout says" in page and "stderr says" not in page
    assert [len(cell.outputs) for cell in notebook.cells[1:]] == [2, 1]


@pytest.mark.slow  # a kernel that imports MLflow
def test_what_the_workbench_says_of_the_runs_is_on_the_page(workplace):
    invent("s", ["frozen", "threshold"])
    deleted = tracking.load_runs("s")["run_id"][0]
    tracking.connect().delete_run(deleted)
    code = (
        "import sys\nfrom workbench import tracking\nprint('a library', file=sys.stderr)\ntracking.load_runs('s')[:0]"
    )
    cells = [nbformat.v4.new_markdown_cell("# A figure"), nbformat.v4.new_code_cell(code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), workplace / "n.ipynb")
    page = report.page("# Report", {"n": report.execute(workplace / "n.ipynb", workplace / "done.ipynb", {})})
    assert page.count("1 deleted runs are left out; to restore one: ") == 1 and f"--run-id {deleted}" in page
    assert "a library" not in page


@pytest.fixture
def started(monkeypatch):
    """Notebooks for which a kernel would have been started; each is "executed" with a text of its own."""
    names = []

    def execute(path, target, parameters, study_run=""):
        names.append(path.stem)
        text = f"# {path.stem}, drawn {names.count(path.stem)} times"
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)], metadata={report.MARK: study_run})
        with output_file(target) as partial:
            nbformat.write(made, partial)
        return made

    monkeypatch.setattr(report, "execute", execute)
    return names


def test_what_cannot_be_drawn_costs_no_kernel_and_stands_last(workplace, started):
    invent("s", ["frozen", "threshold"])
    done = invoke("report")
    assert done.returncode == 0, done.stderr
    assert started == ["methods", "divergence", "tradeoff", "imbalance"]
    page = (workplace / "reports" / "s" / "report.html").read_text()
    for name in ("rounds", "parts", "intervals", "timesteps", "alternatives", "search"):
        assert page.index("imbalance, drawn 1 times<a class") < page.index(f"<em>{name}</em>: ")
    first = page.index("a difference of")  # the headline: one seed an arm
    assert "(one seed, no interval)" in page and first < page.index('id="Trials"') < page.index('id="Made-with"')


def test_one_notebook_renews_its_part_of_the_page_and_leaves_the_others(workplace, started):
    invent("s", ["frozen", "threshold"])
    invoke("report")
    again = invoke("report", "--notebook", "divergence")
    assert again.returncode == 0, again.stderr
    page = (workplace / "reports" / "s" / "report.html").read_text()
    parts = re.findall(r"(\w+), drawn (\d) times<a class", page)
    assert parts == [("methods", "1"), ("divergence", "2"), ("tradeoff", "1"), ("imbalance", "1")]


def test_parts_of_an_earlier_study_of_the_same_name_do_not_stay(workplace, started):
    invent("s", ["frozen", "threshold"])
    invoke("report", "--notebook", "imbalance")
    client = tracking.connect()
    client.delete_run(study_runs.require_study(client, "s").info.run_id)
    study_runs.open_group(client, "other", "")
    client.set_tag(study_runs.require_study(client, "other").info.run_id, "workbench.study", "s")
    for run in client.search_runs(["1"], "tags.`workbench.kind` = 'trial'"):
        client.set_tag(run.info.run_id, "mlflow.parentRunId", study_runs.parents(client, "s")[-1].info.run_id)
    done = invoke("report", "--study", "s", "--notebook", "divergence")
    assert done.returncode == 0, done.stderr
    page = (workplace / "reports" / "s" / "report.html").read_text()
    assert "divergence, drawn 1 times" in page and "imbalance, drawn" not in page
