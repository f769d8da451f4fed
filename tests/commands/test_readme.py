"""What the README says exists, exists."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from workbench.method import reward_scale
from workbench.studies.space import arms_of, read_pruner, read_space
from workbench.studies.tuning import settle
from workbench.training.config import CHOICES, catalogue, known_names, read, resolve
from workbench.training.run import metric_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_its_commands_are_modules():
    modules = set(re.findall(r"python -m workbench\.([a-z_]+)", README))
    assert {"sweep", "train", "report"} <= modules
    for module in modules:
        assert (ROOT / "workbench" / f"{module}.py").exists(), module


def test_its_settings_are_settings():
    sections = "|".join({name.split(".")[0] for name in known_names() if "." in name})
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)`", README))
    assert len(named) > 10
    assert named <= set(known_names()), named - set(known_names())


def test_its_defaults_are_the_defaults():
    defaults = {row.name: row.default for row in catalogue()}
    for name, value in re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| ([^ |,]+) \|", README, re.MULTILINE):
        assert str(defaults[name]) == value, name


def test_its_choices_are_all_the_choices():
    for selector, (key, table, _) in CHOICES.items():
        assert all(f"`{name}`" in README or f"| {name}" in README for name in table), (selector, key)


def test_its_example_is_a_valid_experiment():
    _, block, pruned, several = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    tree, wanted = tomllib.loads(block), tomllib.loads(several)["sweep"]
    config = resolve(
        {"reference.policy": "threshold", "sweep.space": tree["sweep"]["space"], "sweep.arms": tree["sweep"]["arms"]}
    )
    assert len(read_space(config)) == 2
    sweep = resolve({f"sweep.{key}": value for key, value in wanted.items()}).sweep
    assert len(sweep.objectives) == 2 and {name for _, name in sweep.metrics} <= metric_names(config)
    pruning = resolve({f"sweep.{key}": value for key, value in tomllib.loads(pruned)["sweep"].items()})
    assert read_pruner(pruning) and {name for _, name in pruning.sweep.metrics} <= metric_names(config)


def test_its_worked_example_is_a_shape_and_a_study_in_under_15_lines(tmp_path):
    (code,), (file, *_) = (re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("python", "toml"))
    assert len(code.strip().splitlines()) + 1 + len(file.strip().splitlines()) < 15  # 1: its line in SHAPES
    module = dict(vars(reward_scale))
    exec(code, module)
    curve = module["late"](torch.linspace(0.99, 0.01, 11), start=0.5)
    assert curve.tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-6)
    (tmp_path / "late.toml").write_text(file.replace('"late"', '"linear"'))  # which exists without the line in SHAPES
    settings = settle(read(tmp_path / "late.toml"), {})
    assert len(arms_of(resolve(settings), settings)) == 9


def test_its_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_setting_is_explained():
    for row in catalogue():
        assert row.meaning.strip() and not row.meaning.endswith(") "), row.name


@pytest.mark.parametrize("mark", ["@[A-Z_]+@", r"\bTODO\b", r"\bTBD\b"])
@pytest.mark.parametrize("page", ["README.md", "docs/claims.md", "workbench/models/small/assets/model/README.md"])
def test_it_has_no_gaps(mark, page):
    assert not re.search(mark, (ROOT / page).read_text())
