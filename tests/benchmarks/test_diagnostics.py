"""The diagnostics' benchmark: that the same calls are timed on both sides."""

import torch

from workbench.benchmarks.diagnostics import passes
from workbench.benchmarks.stopwatch import stopwatch
from workbench.models import SHAPES, random_backend


def test_diagnostics_are_set_against_their_own_forwards(workplace):
    backend = random_backend(SHAPES["tiny"], torch.device("cpu"))
    diagnose, forwards = passes(backend, SHAPES["tiny"], 40)
    with stopwatch(backend, "denoise") as spent:
        forwards()
    assert spent["denoise"] > 0
    counts = {name: value for name, value in diagnose().items() if name.startswith("timestep_count/")}
    assert len(counts) == 10 and sum(counts.values()) == 3 * 40
