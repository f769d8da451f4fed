from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from workbench.common import validation
from workbench.common.errors import UserError
from workbench.common.locks import exclusive
from workbench.common.paths import folder_from, state_path, storage_place, storage_url


@pytest.mark.parametrize("name", ["plain", "wh?t #1", "100%41", "ünï 中文", "a;b&c=d"])
def test_databases_lie_in_their_folder_whatever_its_name(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("WORKBENCH_STORAGE", raising=False)
    with create_engine(storage_url()).begin() as connection:
        connection.execute(text("CREATE TABLE x (y INTEGER)"))
    with exclusive(storage_url()):
        pass
    assert {path.name for path in (tmp_path / name).iterdir()} >= {"optuna.db"}
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert storage_place().endswith(f":{tmp_path / name / 'optuna.db'}")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "a ?"))
    monkeypatch.setenv("WORKBENCH_STATE", "~/state")
    monkeypatch.setenv("WORKBENCH_STORAGE", "sqlite:///~/optuna.db?timeout=3")
    assert state_path("x") == tmp_path / "a ?" / "state" / "x" and folder_from("NONE", "~") == tmp_path / "a ?"
    url = make_url(storage_url())
    assert Path(url.database) == tmp_path / "a ?" / "optuna.db" and url.query == {"timeout": "3"}


def test_a_question_mark_in_an_address_is_no_end_of_its_path(monkeypatch):
    monkeypatch.setenv("WORKBENCH_STORAGE", "sqlite:////data/what?/optuna.db")
    with pytest.raises(UserError, match=r"WORKBENCH_STORAGE = .*: a question mark in a path is written %3F"):
        storage_url()
    monkeypatch.setenv("WORKBENCH_STORAGE", "postgresql://u@h/d?host=/run/pg")
    assert storage_url() == "postgresql://u@h/d?host=/run/pg"


@pytest.mark.parametrize("text", ["abc", "1.5", "-3", "0", "1e3", "9" * 12])
def test_a_variable_that_is_no_number_is_one_line(text, monkeypatch):
    monkeypatch.setenv("WORKBENCH_GRACE", text)
    with pytest.raises(UserError, match=r"WORKBENCH_GRACE = '.*': expected a whole number, at least 1"):
        validation.whole_number("WORKBENCH_GRACE", 60, least=1)
    monkeypatch.setenv("WORKBENCH_GRACE", " 7 ")
    assert validation.whole_number("WORKBENCH_GRACE", 60, least=1) == 7
