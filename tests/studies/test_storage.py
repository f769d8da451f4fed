import math
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from workbench.studies.storage import _one_writer, open_storage, set_pruned_value


def test_a_sqlite_transaction_that_has_begun_keeps_others_from_reading_what_it_will_change(tmp_path):
    first, second = (create_engine(f"sqlite:///{tmp_path / 's.db'}", connect_args={"timeout": 0.1}) for _ in range(2))
    for engine in (first, second):
        _one_writer(engine)
    with first.begin() as connection:
        connection.execute(text("create table trials (state text)"))
        with pytest.raises(OperationalError, match="locked"), second.begin():
            pass
    with second.begin() as connection:
        assert connection.execute(text("select count(*) from trials")).scalar() == 0


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_no_two_workers_take_the_same_waiting_trial(tmp_path):
    url = f"sqlite:///{tmp_path / 's.db'}"
    study = optuna.create_study(study_name="s", storage=open_storage(url))
    for value in range(24):
        study.enqueue_trial({"x": value})

    def take(_: int) -> list[int]:
        mine = optuna.load_study(study_name="s", storage=open_storage(url))
        return [mine.ask().number for _ in range(6)]

    with ThreadPoolExecutor(4) as pool:
        taken = [number for numbers in pool.map(take, range(4)) for number in numbers]
    assert sorted(taken) == list(range(24))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seen", [0.25, math.inf, -math.inf, math.nan, None])
@pytest.mark.parametrize("value", [0.5, None])
def test_a_pruned_trial_gets_its_value_whatever_the_pruner_saw(tmp_path, seen, value):
    """Optuna keeps an infinite value in another column, and none where there was no number."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    study = optuna.create_study(study_name="s", storage=open_storage(url))

    def stopped(trial):
        if seen is not None:
            trial.report(seen, 1)
        raise optuna.TrialPruned

    study.optimize(stopped, n_trials=1)
    for _ in range(2):  # once more changes nothing
        set_pruned_value(study, study.get_trials()[0], value)
        (trial,) = optuna.load_study(study_name="s", storage=open_storage(url)).get_trials()
        assert trial.values == (None if value is None else [value])
