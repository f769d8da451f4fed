"""What each notebook needs of a study, found out from its runs before a kernel is started for it.

A kernel takes seconds to start. What is asked here is what the notebooks' own functions would complain of, so that both
say the same; a notebook that is not named here is tried.
"""

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from workbench.analysis import paper, rounds, tables
from workbench.analysis.divergence_figures import GAINS
from workbench.common.errors import UserError
from workbench.studies import results
from workbench.tracking.frames import choose_runs

Parameters = Mapping[str, Any]  #: of the notebook, its defaults among them


def require(name: str, study: str, runs: pl.DataFrame, parameters: Parameters) -> None:
    """Raise what a notebook would raise on these runs, as far as the runs alone can tell.

    Args:
        name: of the notebook.
        runs: all of the study.
    Raises:
        UserError: the study lacks what the notebook needs.
    """
    if name in NEEDS:
        NEEDS[name](study, runs, parameters)


def _rounds(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    rounds.rounds_of(runs)


def _methods(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    arms = given["arms"] or tables.methods(runs)
    others = (given[key] for key in ("ours", "against", "columns") if given[key])
    _scored(tables.of_arms(runs, ",".join([arms, *others])))


def _divergence(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    _logged(choose_runs(runs, given["runs"], study) if given["runs"] else runs, given["margin"], "divergence/policy")


def _tradeoff(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    tables.front(runs, given["score"])


def _parts(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    _logged(tables.paper_arms(runs).filter(pl.col("state") == "complete"), *GAINS)


def _imbalance(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    chosen = choose_runs(runs, given["runs"], study) if given["runs"] else tables.baseline(runs)
    tables.by_bucket(chosen, "loss")


def _intervals(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    _scored(tables.of_arms(runs, given["arms"]))


def _timesteps(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    tables.of_arms(runs, f"{given['arms']},{given['base']}")
    tables.of_arms(runs, ",".join(paper.TABLE_4), stopped=True)


def _alternatives(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    tables.of_arms(runs, ",".join(paper.TABLE_3), stopped=True)


def _search(study: str, runs: pl.DataFrame, given: Parameters) -> None:
    results.open_search(study)


NEEDS: dict[str, Callable[[str, pl.DataFrame, Parameters], None]] = {
    "rounds": _rounds,
    "methods": _methods,
    "divergence": _divergence,
    "tradeoff": _tradeoff,
    "parts": _parts,
    "imbalance": _imbalance,
    "intervals": _intervals,
    "timesteps": _timesteps,
    "alternatives": _alternatives,
    "search": _search,
}


def _logged(runs: pl.DataFrame, *metrics: str) -> None:
    for metric in metrics:
        if metric not in runs.columns or runs[metric].null_count() == len(runs):
            raise UserError(f"metric {metric!r}: no finished run of the study has it")


def _scored(runs: pl.DataFrame) -> None:
    """Refuse runs whose samples were not scored, as the true reward of a sample is what the figures show."""
    _logged(runs, "eval/reward")
