import pytest

from workbench.analysis.claims.forest import FARTHEST, forest


def effect(mean, half, verdict, statement="a", seeds=5):
    interval = {"low": mean - half, "high": mean + half}
    return {"mean": mean, "verdict": verdict, "statement": statement, "seeds": seeds} | interval


def test_effects_of_all_units_are_drawn_in_half_widths_with_those_far_away_at_the_edge():
    rows = [
        {"number": 1, "effects": [effect(3e-3, 1e-3, "holds"), effect(-50.0, 10.0, "does not hold here")]},
        {"number": 2, "effects": []},
        {"number": 3, "effects": [effect(900.0, 1.0, "holds", "x" * 90), effect(1.0, 0.0, "")]},
    ]
    (axes,) = forest(rows).axes
    points = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert [round(line.get_xdata()[0], 6) for line in points] == [3, -5, FARTHEST, FARTHEST]
    assert [line.get_marker() for line in points] == ["o", "D", ">", "x"]
    intervals = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2][1:]  # the first is zero's
    assert [[round(float(x), 6) for x in each] for each in intervals[:2]] == [[2, 4], [-6, -4]]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "1  a" and labels[2].startswith("3  xxx") and labels[2].endswith(" ...")


@pytest.mark.parametrize(("seeds", "called"), [((2, 2), "no verdict"), ((5, 2), "inconclusive")])
def test_where_seeds_are_too_few_for_any_verdict_nothing_is_called_inconclusive(seeds, called):
    rows = [{"number": 1, "effects": [effect(1.0, 0.0, "inconclusive", seeds=count) for count in seeds]}]
    (axes,) = forest(rows).axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["holds", called, "does not hold here", "shown, decides nothing"]
