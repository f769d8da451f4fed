"""Diffusion DPO Workbench: preference optimisation of text-to-image diffusion models, tracked and analysed.

`import workbench as wb` offers to a notebook what docs/python.md describes: `wb.runs("default")`, `wb.train_run(...)`.
"""

from typing import TYPE_CHECKING, Any

from workbench.common.version import __version__

__all__ = [
    "__version__", "best_trial", "compare", "config", "history", "list_studies", "pictures", "run_study", "runs",
    "samples", "train_run", "trials", "win_rate",
]  # fmt: skip

if TYPE_CHECKING:
    from workbench.analysis.api import (
        best_trial,
        compare,
        config,
        history,
        list_studies,
        pictures,
        run_study,
        runs,
        samples,
        train_run,
        trials,
        win_rate,
    )


def __getattr__(name: str) -> Any:
    # None of these is called as a command or a package is: those are attributes of this module too, once imported.
    # Only when one of them is used: a command that needs neither polars nor MLflow must not import them.
    if name not in __all__:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    from workbench.analysis import api

    return getattr(api, name)
