"""Bad input through the real commands: one line that names it, nothing written, no hang, no code run."""

import bad_checkpoints
import bad_data
import bad_settings
import pytest
import torch
from bad_inputs import Place, files, run, tracked

from workbench.backends import load
from workbench.data import open_rows
from workbench.encoding import encode

CASES = [*bad_settings.cases(), *bad_data.cases(), *bad_checkpoints.cases()]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Tracking store, studies and cache that all cases share: to make them anew takes longer than most cases."""
    from workbench import tracking

    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("WORKBENCH_STORAGE", f"sqlite:///{folder / 'optuna.db'}")
        patch.setenv("WORKBENCH_STATE", str(folder / "state"))
        patch.setenv("WORKBENCH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        tracking.experiment(tracking.connect())
        yield folder


@pytest.fixture(scope="module")
def encoded(tiny_model, tiny_pairs, stores):
    """A finished encoding of the tiny pairs."""
    backend = load(str(tiny_model), torch.device("cpu"))
    encode(open_rows(str(tiny_pairs), "train"), backend, into=stores / "store")
    return stores / "store"


@pytest.fixture
def place(tiny, encoded, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Place(folder, tiny, encoded)


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_it_is_one_line_and_nothing_is_written(bad, place, stores):
    command, *arguments = bad.make(place)
    before, runs = files(place.folder), tracked(stores / "mlflow.db")
    ended = run(command, *arguments)
    assert ended.code == bad.code, ended.output
    assert len(ended.errors) == 1 and len(ended.errors[0]) < 1100, ended.output
    assert ended.errors[0].isprintable() and all(text in ended.errors[0] for text in bad.says), ended.errors
    assert "Traceback" not in ended.output
    assert files(place.folder) == before and tracked(stores / "mlflow.db") == runs
    assert not list(stores.rglob("*.partial"))
    assert not (place.folder / bad_checkpoints.CANARY).exists()
