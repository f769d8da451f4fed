"""Runs of settings, prepared and trained in the test's own process."""

from collections.abc import Mapping
from typing import Any

from workbench.training.config import Config, resolve
from workbench.training.listener import Listener, NullListener
from workbench.training.preparation import Prepared, prepare
from workbench.training.run import execute


def run(
    settings: Mapping[str, Any] | Config, listener: Listener | None = None, prepared: Prepared | None = None, **how: Any
) -> dict[str, float]:
    """Train with dotted settings, or a configuration; returns the last value of every metric.

    Args:
        prepared: what an earlier run of such settings has used.
        how: as `execute` takes it.
    """
    config = settings if isinstance(settings, Config) else resolve(settings)
    return execute(config, prepared or prepare(config), listener or NullListener(), **how)
