import json

import pytest

from tests.support.commands import invoke
from workbench.analysis.claims.comparison import side_by_side


def effect(statement, mean, *, decides=True, seeds=5):
    half = 1 if seeds > 2 else 0
    interval = {"low": mean - half, "high": mean + half}
    return {"statement": statement, "mean": mean, "decides": decides, "seeds": seeds, **interval}


def row(number, verdict, *effects, reason="", **more):
    about = {"number": number, "title": f"claim {number}", "verdict": verdict, "reason": reason}
    return about | {"effects": [*effects]} | more


def written(folder, *rows):
    folder.mkdir(parents=True)
    (folder / "claims.json").write_text(json.dumps(rows))
    return folder


def measured(folder, *, drift, updates=True):
    """The regime of a study, of which two numbers are known."""
    known = {"its drift": drift, "its updates": updates}
    rows = [{"statement": statement, "value": 1.0, "inside": inside} for statement, inside in known.items()]
    (folder / "regime.json").write_text(json.dumps(rows))


def test_verdicts_stand_side_by_side_with_the_effects_that_decide(tmp_path):
    level = effect("level", 9.0, decides=False)
    first = written(
        tmp_path / "first",
        row(2, "holds", effect("gain", 2.0), level, steps=[128]),
        row(7, "holds", effect("win", 3), steps=[128]),
    )
    again = written(
        tmp_path / "again",
        row(2, "does not hold here", effect("gain", -2.0), steps=[64, 512]),
        row(7, "not measured", reason="arm 'kto': none"),
    )
    quick = written(tmp_path / "quick", row(2, "inconclusive", effect("gain", -0.5, seeds=2)))
    measured(first, drift=True)
    measured(again, drift=False)
    assert side_by_side([first, again, quick]).splitlines()[2:] == [
        "|  | seeds | 5 | 5 | 2 |",
        "|  | training steps | 128 | 64, 512 | not stored |",
        "|  | regime | the paper's | another than the paper's: its drift | not measured |",
        "| 2 | **claim 2** | **holds** | **does not hold here** | **leans against (no verdict)** |",
        "|  | gain | +2 (+1 to +3) | -2 (-3 to -1) | -0.5 (2 seeds: no interval) |",
        "| 7 | **claim 7** | **holds** | **not measured**: arm 'kto': none |  |",
        "|  | win | +3 (+2 to +4) |  |  |",
    ]


def test_the_command_compares_and_runs_nothing(workplace):
    folders = [written(workplace / "reports" / name, row(1, "holds", effect("x", 2))) for name in ("a", "b")]
    done = invoke("claims", *(part for folder in folders for part in ("--compare", folder)))
    assert done.returncode == 0 and "| # | claim, and its effects | a | b |" in done.stdout
    assert not (workplace / "optuna.db").exists() and sorted(p.name for p in folders[0].parent.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("beside", "named"),
    [(["my.toml"], "[EXPERIMENT.toml]"), (["--quick", "--out", "x"], "--quick, --out"), (["--set", "seed=1"], "--set")],
)
def test_what_would_be_ignored_is_refused(beside, named, workplace):
    folder = written(workplace / "a", row(1, "holds", effect("x", 2)))
    done = invoke("claims", *beside, "--compare", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == f"Error: --compare: runs nothing, so it takes no {named}"


def test_what_is_no_table_of_claims_is_refused(workplace):
    good = written(workplace / "good", row(1, "holds", effect("x", 2)))
    written(workplace / "other" / "good", row(1, "holds", effect("x", 2)))
    lacking = effect("x", 2)
    del lacking["mean"]
    (workplace / "bad").mkdir()
    for text, says in {
        "{}": "not a table of claims (Input should be a valid array)",
        "[": "cannot be read",
        json.dumps([row(1, "holds", steps="128")]): "0.steps: Input should be a valid array",
        '[{"number": 1}]': "0.title: Field required",
        json.dumps([row(1, "holds") | {"effects": None}]): "0.effects: Input should be a valid array",
        json.dumps([row(1, "holds", effect("x", 2), lacking)]): "0.effects.1.mean: Field required",
        json.dumps([row(1, "holds", effect("x", 2) | {"low": None})]): "0.effects.0.low: Input should be a valid",
    }.items():
        (workplace / "bad" / "claims.json").write_text(text)
        done = invoke("claims", "--compare", "bad")
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert says in done.stderr
    (good / "regime.json").write_text('[{"inside": true}]')
    assert "not the measures of a regime (0.statement: " in invoke("claims", "--compare", good).stderr
    (good / "regime.json").unlink()
    assert "no claims.json" in invoke("claims", "--compare", workplace).stderr
    assert "two folders are called good" in invoke("claims", "--compare", good, "--compare", "other/good").stderr
