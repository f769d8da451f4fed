"""Optimizers that need a package of their own."""

import logging
import sys

import pytest
import torch
from torch import nn

from workbench.common.errors import UserError
from workbench.training.optimizers import OPTIMIZERS

HOW = {"betas": (0.9, 0.99), "weight_decay": 0.01, "epsilon": 1e-8}


@pytest.mark.parametrize(
    ("name", "package"),
    [("adamw_8bit", "bitsandbytes"), ("adamw_paged", "bitsandbytes"), ("prodigy", "prodigyopt")],
)
def test_a_missing_package_is_one_line_that_names_it(monkeypatch, name, package):
    for module in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(UserError, match=rf"train\.optimizer = '{name}': needs {package} \(pip install {package}\)"):
        OPTIMIZERS[name]([nn.Parameter(torch.ones(2))], lr=1.0, **HOW)


def test_prodigy_finds_its_step_and_says_where_a_rate_was_meant_for_another(caplog, capsys):
    pytest.importorskip("prodigyopt")
    weight = nn.Parameter(torch.full((4,), 5.0))
    optimizer = OPTIMIZERS["prodigy"]([weight], lr=1.0, **HOW)
    assert not caplog.records and capsys.readouterr().out == ""
    for _ in range(300):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
    assert weight.abs().max() < 0.5
    with caplog.at_level(logging.WARNING):
        OPTIMIZERS["prodigy"]([weight], lr=3e-6, **HOW)
    assert "train.lr = 3e-06 is a factor of the rate that prodigy finds" in caplog.text
