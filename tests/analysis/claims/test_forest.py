from workbench.analysis.claims.forest import FARTHEST, forest


def effect(mean, half, verdict, statement="a"):
    return {"mean": mean, "low": mean - half, "high": mean + half, "verdict": verdict, "statement": statement}


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
