"""What README and docs/ say exists, exists, and they form a site without broken links."""

import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

from tests.support.helpers import ROOT
from workbench import train
from workbench.__main__ import main
from workbench.evaluation import REWARD_MODELS
from workbench.models import FAMILIES
from workbench.models.checkpoints import ASSETS
from workbench.studies.experiment import Experiment
from workbench.training.catalogue import catalogue
from workbench.training.config import CHOICES, known_names
from workbench.training.experiment_file import read
from workbench.training.measurements import metric_names

README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
EXAMPLES = sorted(path for folder in ("experiments", "notebooks") for path in (ROOT / folder).rglob("*.*"))
TEXT = {page.name: page.read_text() for page in PAGES}
EVERYTHING = "\n".join(TEXT.values())
TAGS = {"state"}  #: of MLflow runs, which are called workbench.NAME too
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- files, modules, commands ------------------------------------------------------------------------------------


@every_page
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.name)
def test_the_files_and_modules_that_it_names_exist(page):
    text = page.read_text()
    for path in set(re.findall(r"\b((?:workbench|tests|experiments|notebooks|docs)/[\w./*-]*\w)", text)):
        if "NAME" not in path:
            assert list(ROOT.glob(path)), path
    for module in set(re.findall(r"\bworkbench\.([a-z_.]*[a-z_])", text)) - TAGS:
        place = ROOT / "workbench" / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or place.is_dir(), module


def test_the_tables_that_the_architecture_names_exist():
    code = "\n".join(path.read_text() for path in (ROOT / "workbench").rglob("*.py"))
    for name in set(re.findall(r"`([A-Z_]{3,})`", TEXT["architecture.md"])):
        assert re.search(rf"^{name}\b", code, re.MULTILINE), name


@every_page
def test_its_commands_exist(page):
    commands = set(main.list_commands(click.Context(main)))
    called = set(re.findall(r"(?:-m workbench\.|^workbench )([a-z_]+)", page.read_text(), re.MULTILINE))
    assert called <= commands, called - commands
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def parsed(line: str) -> int:
    """Let click read the workbench's commands of a line, and run none of them; how many there were."""
    found = re.findall(r"(?:-m workbench\.|^workbench )(.+?)(?= && |$)", line)
    for text in found:
        name, *words = shlex.split(text, comments=True)
        command = main.get_command(click.Context(main), name)
        if isinstance(command, click.Group) and words[0] != "--help":
            command = command.commands[words.pop(0)]
        try:
            with command.make_context(name, words):
                pass
        except click.exceptions.Exit as ended:  # of --help and --settings
            assert ended.exit_code == 0, line
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")
    return len(found)


@every_page
def test_its_commands_can_be_given_as_they_stand(page):
    for block in blocks(page.read_text(), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            parsed(line.strip())


def helped() -> list[tuple[str, click.Command]]:
    """Every command, and those of `study`, by name."""
    commands = [(name, main.get_command(click.Context(main), name)) for name in main.list_commands(click.Context(main))]
    return [*commands, *((f"study {name}", each) for name, each in dict(commands)["study"].commands.items())]


def test_the_examples_of_their_help_can_be_given_as_they_stand():
    count = 0
    for _, command in helped():
        _, _, examples = inspect.cleandoc(command.help).partition("Example")
        # A line that goes on is indented more; what stands in brackets is said of the example.
        lines = re.sub(r"\n {3,}(?=\S)", " ", re.sub(r"^ {0,2}", "", examples, flags=re.MULTILINE))
        count += sum(parsed(re.sub(r"\s+\(.*\)$", "", line)) for line in lines.splitlines())
    assert count > 50


def test_every_option_says_what_it_is_for():
    for name, command in helped():
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts[0]}"


def test_each_paragraph_of_their_help_begins_a_thought_and_fills_its_lines():
    for name, command in helped():
        for lines in (part.splitlines() for part in inspect.cleandoc(command.help).split("\n\n")):
            assert lines[0].split()[:1] not in (["Or"], ["And"], ["It"]), f"{name}: {lines[0]}"
            for line, following in itertools.pairwise([] if lines[0] == "\b" else lines):
                # Of 116 columns; a word may be kept with the one after it.
                assert len(line) + len(following.split()[0]) > 100, f"{name}: {line}"


def test_the_list_of_studys_commands_is_not_cut_short():
    shown = CliRunner().invoke(main, ["study", "--help"], terminal_width=80).output
    assert "..." not in shown.partition("Commands:")[2], shown


def test_the_readme_is_short_and_every_page_is_linked_from_it():
    assert len(README.read_text().splitlines()) <= 160
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", TEXT["README.md"]))
    indexed = set(re.findall(r"\]\(([\w-]+\.md)\)", TEXT["index.md"]))
    names = {page.name for page in DOCS}
    assert names - {"index.md"} <= indexed
    assert names - {"claims-table.md", "claims-compared.md"} <= linked  # which the claims' own page links
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert set(re.findall(r"[\w-]+\.md", str(nav))) == names


def test_the_packages_that_it_lists_are_the_packages():
    packages = {path.parent.name for path in (ROOT / "workbench").glob("*/__init__.py")}
    table = TEXT["README.md"].split("| package |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE)) == packages
    table = TEXT["architecture.md"].split("| package |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `workbench/([a-z]+)` \|", table, re.MULTILINE)) == packages


def test_the_site_builds_without_a_warning(tmp_path):
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} >= {page.stem for page in DOCS}
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert not loaded, "the site must need no network"


def test_the_small_models_picture_is_the_one_that_comes_with_it():
    same = (ROOT / "docs" / "small-model.png").read_bytes() == (ASSETS / "model" / "samples.png").read_bytes()
    assert same, "cp workbench/models/small/assets/model/samples.png docs/small-model.png"


# --- settings and examples ---------------------------------------------------------------------------------------


@every_page
def test_its_settings_are_settings(page):
    known = {row.name for row in catalogue()}
    sections = "|".join({name.split(".")[0] for name in known if "." in name})
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)(?: = [^`]+)?`", page.read_text()))
    assert named <= known, named - known


def test_the_page_of_settings_is_what_the_code_says():
    _, generated = re.split(r"^<!--.*-->\n", TEXT["settings.md"], flags=re.MULTILINE)
    assert generated == CliRunner().invoke(train.main, ["--settings"]).output, "make docs renews the page"


def test_every_choice_is_explained():
    for selector, (key, table, _) in CHOICES.items():
        assert all(f"`{name}`" in EVERYTHING for name in table), (selector, key)
    assert all(f"| `{name}` |" in TEXT["method.md"] for name in CHOICES["objective"][1])
    assert all(f"| `{name}` |" in TEXT["real-models.md"] for name in FAMILIES)
    assert all(f"| `{name}`" in TEXT["evaluation.md"] for name in REWARD_MODELS)


def test_every_setting_is_explained():
    rows = catalogue()
    assert {row.name for row in rows} >= {name for name in known_names() if not name.startswith("sweep.")}
    for row in rows:
        assert row.meaning.strip(), row.name
    betas = {choice: row.default for row in rows if row.name == "objective.beta" for choice in row.choices}
    assert betas["dpo"] == betas["linear"] == "300.0" and betas["kto"] == "150.0"  # a default for each choice


@pytest.fixture
def worked_example(tmp_path, no_plugins):
    """A folder with the experiments, and beside them the README's function and the study that chooses it."""
    (code,), (file,) = blocks(TEXT["README.md"], "python"), blocks(TEXT["README.md"], "toml")
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "late.toml").write_text(file)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    return tmp_path


@every_page
def test_its_examples_are_valid_experiments(page, worked_example):
    for block in blocks(page.read_text(), "toml"):
        (worked_example / "example.toml").write_text(block)
        experiment = Experiment.resolve(read(worked_example / "example.toml"))
        assert {name for _, name in experiment.sweep.metrics} <= metric_names(experiment.config)


def test_the_worked_example_is_a_shape_and_a_study_in_under_15_lines(worked_example):
    code, file = ((worked_example / name).read_text().strip() for name in ("mine.py", "late.toml"))
    assert len(code[code.index("def ") :].splitlines()) + len(file.splitlines()) < 15  # imports are not counted
    study = Experiment.resolve(read(worked_example / "late.toml"))
    assert len(study.arms) == 9 and not study.space
    shape, settings = study.arms[-1].config.chosen("reward_scale")
    assert settings == {"start": 0.5}
    curve = shape(torch.linspace(0.99, 0.01, 11), **settings)
    assert curve.tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-6)


@pytest.mark.parametrize("mark", ["@[A-Z_]+@", r"\bTODO\b", r"\bTBD\b"])
@pytest.mark.parametrize("page", [*PAGES, ASSETS / "model" / "README.md"], ids=lambda page: page.name)
def test_it_has_no_gaps(mark, page):
    assert not re.search(mark, page.read_text())
