"""A study as plain files, for other tools or other machines."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from optuna import Study

from workbench import tracking
from workbench.common.outputs import output_file, require_own
from workbench.studies.records import StudyRecord


def export_study(study: Study, folder: Path) -> Iterator[Path]:
    """Write a study's trials, runs, metrics and settings into a folder; yields each file once it is whole.

    Raises:
        UserError: the folder holds one of these files already, and the workbench has not written it.
    """
    trials, runs = _trials(study), tracking.load_runs(study.study_name)
    settings = json.dumps(StudyRecord.of(study).settings, indent=2)
    writers: dict[str, Callable[[Path], object]] = {
        "trials.csv": lambda path: trials.to_csv(path, index=False, encoding="utf-8"),
        "trials.parquet": lambda path: trials.to_parquet(path, index=False),
        "runs.parquet": lambda path: runs.write_parquet(path),
        "history.parquet": lambda path: tracking.load_history(runs).sort("run_id", "step").write_parquet(path),
        "settings.json": lambda path: path.write_text(settings, encoding="utf-8"),
    }
    require_own(folder, *writers)
    for name, write in writers.items():
        with output_file(folder / name) as partial:
            write(partial)
        yield folder / name


def _trials(study: Study) -> pd.DataFrame:
    """Every attempt as Optuna has it, a row each."""
    frame = study.trials_dataframe(multi_index=False)
    # The columns of studies whose metrics have names in Optuna, as those of others: value, or values_0, values_1.
    names = [*StudyRecord.of(study).sweep.objectives]
    plain = ["value"] if len(names) == 1 else [f"values_{place}" for place in range(len(names))]
    frame = frame.rename(columns={f"values_{name}": column for name, column in zip(names, plain, strict=True)})
    for column in frame.columns:  # nested attributes, which a table has no place for
        if frame[column].map(lambda value: isinstance(value, dict | list)).any():
            frame[column] = frame[column].map(lambda v: json.dumps(v) if isinstance(v, dict | list) else v)
    return frame
