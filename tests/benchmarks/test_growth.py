"""How costs grow: that it is measured, drawn and kept."""

import json

import torch

from workbench.benchmarks import growth
from workbench.benchmarks.figure import Options

CPU = torch.device("cpu")


def test_costs_that_grow_are_measured_drawn_and_kept(tmp_path):
    options = Options(5, CPU, tmp_path)
    measured = [
        growth.batches(CPU, (1, 2), 2, model="tiny"),
        growth.resolutions(CPU, (8, 16), 2),
        growth.trials(options.folder, (5, 10), 2),
        *growth.passes(options, (5, 10), (20, 40), 2, model="tiny"),
    ]
    assert [one.x for one in measured] == [(1, 2), (8, 16), (5, 10), (5, 10), (20, 40)]
    for one in measured:
        assert all(0 < a <= b <= c for a, b, c in zip(one.low, one.median, one.high, strict=True))
    again = [growth.Series.from_dict(one) for one in json.loads(json.dumps([one.as_dict() for one in measured]))]
    assert again == measured
    path = options.folder / "growth.png"
    growth.draw(measured, path)
    assert path.stat().st_size > 10_000
