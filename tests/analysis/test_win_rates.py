import polars as pl
import pytest

from workbench.analysis import paper, win_rates


def frame(scores, prompts="set"):
    """Two prompts with two images each; model -> scorer -> four scores."""
    rows = []
    for model, by_scorer in scores.items():
        for i in range(4):
            row = {
                "model": model,
                "prompts": prompts,
                "row": i // 2,
                "prompt": "ab"[i // 2],
                "category": "",
                "seed": i % 2,
            }
            rows.append(row | {scorer: float(values[i]) for scorer, values in by_scorer.items()})
    return pl.DataFrame(rows)


OURS = {"clip": [1, 2, 3, 4], "hpsv2": [0, 0, 0, 0]}
OTHER = {"clip": [0, 2, 4, 5], "hpsv2": [-1, -1, 0, 1]}


def test_wins_are_counted_image_by_image_and_ties_are_half():
    rates = win_rates.win_rates(frame({"ours": OURS, "frozen": OTHER}), "ours", ["clip", "hpsv2"])
    assert rates.select("prompts", "against", "scorer", "count").rows() == [
        ("set", "frozen", name, 2) for name in ("clip", "hpsv2", "average")
    ]
    assert rates["mean"].to_list() == pytest.approx([(1 + 0.5 + 0 + 0) / 4, (1 + 1 + 0.5 + 0) / 4, 0.5])


def test_intervals_resample_prompts_not_images():
    rates = win_rates.win_rates(frame({"ours": OURS, "frozen": OTHER}), "ours", ["clip"])
    assert rates["scorer"].to_list() == ["clip"]  # no average of one
    assert rates.select("low", "high").row(0) == (0.0, 0.75)  # prompt a: 0.75, prompt b: 0
    means = win_rates.score_means(frame({"ours": OURS}), ["clip"])
    assert means.select("mean", "low", "high").row(0) == (2.5, 1.5, 3.5)


def test_images_are_paired_by_prompt_and_seed_whatever_their_order():
    scores = frame({"ours": OURS, "frozen": OTHER})
    shuffled = scores.sample(fraction=1, shuffle=True, seed=1)
    for ours, against in (("ours", "frozen"), ("frozen", "ours")):
        rates = win_rates.win_rates(shuffled, ours, ["clip"])
        assert rates["against"].to_list() == [against]
        assert rates["mean"][0] == (0.375 if ours == "ours" else 0.625)


def test_the_papers_layout():
    scores = pl.concat([frame({"ours": OURS, "frozen": OTHER}, name) for name in ("Pick-a-Pic v2", "mine")])
    headings = {"clip": "CLIP", "hpsv2": "HPSv2"}
    rates = win_rates.win_rates(scores, "ours", list(headings))
    table = win_rates.win_table(rates, headings, paper.TABLE_1, "paper, SD1.5")
    assert table.columns == [
        "prompts",
        "ours against",
        "CLIP, %",
        "HPSv2, %",
        "average, %",
        "average (paper, SD1.5), %",
    ]
    assert table.row(0) == (
        "Pick-a-Pic v2", "Diffusion-DPO", "37.5 (0.0 to 75.0)", "62.5 (25.0 to 100.0)", "50.0 (12.5 to 87.5)", "67.0"
    )  # fmt: skip
    assert table["average (paper, SD1.5), %"].to_list() == ["67.0", None]
    assert "average (paper, SD1.5), %" not in win_rates.win_table(rates, headings, {}, "").columns


def test_the_layout_of_raw_scores():
    scores = pl.concat([frame({"ours": OURS, "frozen": OTHER}, name) for name in ("one", "two")])
    table = win_rates.score_table(win_rates.score_means(scores, ["clip"]), {"clip": "CLIP"})
    assert table.rows() == [
        (prompts, model, text)
        for prompts in ("one", "two")
        for model, text in (("ours", "2.500 (1.500 to 3.500)"), ("Diffusion-DPO", "2.750 (1.000 to 4.500)"))
    ]
