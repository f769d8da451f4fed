"""Commands that only look: in a folder where nothing is, they say where they looked and leave the folder as it is."""

import pytest

from tests.support.commands import invoke
from workbench import study, tracking
from workbench.analysis import api
from workbench.common.errors import UserError
from workbench.studies.storage import open_storage

#: Subcommand of `study` -> its arguments, once or several times.
STUDY = {
    "status": [(), ("x",)],
    "resume": [("x",)],
    "best": [("x", "--output", "best")],
    "doctor": [(), ("x",), ("--dry-run",)],
    "relocate": [("/old", "/new")],
    "export": [("x",)],
    "rename": [("x", "y"), ("x", "y", "--yes")],
    "forget": [("x", 0), ("x", 0, "--yes")],
    "delete": [("x",), ("x", "--yes")],
}
OTHERS = [
    ("report",),
    ("report", "--study", "x"),
    ("export_lora", "runs:/123", "lora.safetensors"),
    ("prefer", "--model", "runs:/123", "--out", "out", "--work", "work"),
]


@pytest.fixture
def empty(workplace):
    """A working folder without stores."""
    (workplace / "mlflow.db").unlink()
    return workplace


def test_every_subcommand_of_study_is_looked_at():
    assert set(STUDY) == set(study.main.commands)


@pytest.mark.parametrize(
    "arguments",
    [*(("study", name, *each) for name, several in STUDY.items() for each in several), *OTHERS],
    ids=lambda each: " ".join(map(str, each)),
)
def test_it_says_where_it_looked_and_makes_nothing(arguments, empty):
    done = invoke(*arguments)
    said = (done.stdout + done.stderr).strip()
    assert not [*empty.iterdir()]
    assert said.count("\n") == 0 and "o study yet: there is no " in said, said
    assert any(str(empty / file) in said for file in ("optuna.db", "mlflow.db"))
    without_name = arguments in (("study", "status"), ("study", "doctor"), ("study", "doctor", "--dry-run"))
    assert done.returncode == (0 if without_name else 2)


def test_neither_do_those_that_read_in_python(empty):
    assert api.list_studies().is_empty() and api.list_studies().columns == ["study", "state", "runs"]
    for look in (lambda: tracking.load_runs("x"), lambda: tracking.load_lost("x")):
        with pytest.raises(UserError, match=rf"there is no {empty}/mlflow\.db"):
            look()
    assert invoke("study", "status", "--json").stdout.strip() == "[]"
    assert not [*empty.iterdir()]


def test_a_study_database_alone_is_looked_at_without_a_tracking_store(empty):
    open_storage(f"sqlite:///{empty / 'optuna.db'}")
    for arguments in (("doctor", "--dry-run"), ("relocate", "/old", "/new"), ("delete", "x"), ("rename", "x", "y")):
        done = invoke("study", *arguments)
        assert "Traceback" not in done.stderr and not (empty / "mlflow.db").exists(), (arguments, done.stderr)
        # No study is there, so none has lost its runs.
        assert "doctor" not in arguments or (done.returncode, done.stdout) == (0, "All is well.\n"), done.stdout
