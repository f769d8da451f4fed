"""What rounds gain, from invented runs: which runs are rounds, their gains and intervals, the figure, the page."""

import matplotlib.pyplot as plt
import polars as pl
import pytest

from workbench.analysis import needs, rounds
from workbench.common.errors import UserError


def run(number: int, **changed) -> dict:
    row = {"run_id": f"id{number}", "name": f"mine-round-{number}", "arm": f"mine-round-{number}", "state": "complete",
           "rounds.count": "2", "divergence/policy": 0.01 * number, "validation/margin": 0.1 * number}  # fmt: skip
    return row | changed


def samples(number: int, gains: list[float]) -> pl.DataFrame:
    """Two images of each prompt, whose gains differ by 0.2 around the prompt's."""
    rows = [
        {"run_id": f"id{number}", "caption": f"p{i}", "reward": gain + way - 1, "pretrained_reward": -1.0}
        for i, gain in enumerate(gains)
        for way in (-0.1, 0.1)
    ]
    return pl.DataFrame(rows)


def test_rounds_are_the_complete_runs_of_rounds_the_newest_of_each():
    rows = [run(1, run_id="old"), run(1), run(2), run(3, state="pruned"), run(9, **{"rounds.count": None}),
            run(4, name="one-run")]  # fmt: skip
    found = rounds.rounds_of(pl.DataFrame(rows))
    assert found.select("round", "run_id").rows() == [(1, "id1"), (2, "id2")]
    for none in (pl.DataFrame([run(1)]).drop("rounds.count"), pl.DataFrame([run(1, state="pruned")])):
        with pytest.raises(UserError, match="has no rounds"):
            needs.require("rounds", "s", none, {})


def test_rounds_of_another_folder_are_not_taken_for_what_went_on_from_these():
    other = [run(n, run_id=f"other{n}") for n in (1, 2)]
    longer = [run(n) for n in (1, 2, 3, 4)]
    found = rounds.rounds_of(pl.DataFrame([*longer, *other]))
    assert found["run_id"].to_list() == ["other1", "other2"]
    assert rounds.rounds_of(pl.DataFrame([*other, *longer]))["run_id"].to_list() == ["id1", "id2", "id3", "id4"]


def test_gains_begin_at_round_0_and_their_intervals_are_over_prompts():
    made = rounds.rounds_of(pl.DataFrame([run(1), run(2)]))
    table = rounds.by_round(made, pl.concat([samples(1, [0.5, 0.5, 0.5]), samples(2, [0.0, 1.0, 2.0])]))
    assert table["round"].to_list() == [0, 1, 2] and table["prompts"].to_list() == [None, 3, 3]
    assert table["reward"].to_list() == pytest.approx([0, 0.5, 1])
    # Images of one prompt are averaged first: prompts that gain alike leave nothing to vary.
    assert table["reward_low"].to_list()[:2] == pytest.approx([0, 0.5])
    assert -1e-9 <= table["reward_low"][2] < 1 < table["reward_high"][2] <= 2 + 1e-9
    assert table["divergence"].to_list() == pytest.approx([0, 0.01, 0.02])
    assert table["judge"].null_count() == 3
    words = rounds.in_words(table)
    assert words.columns == ["round", "gain in true reward", "divergence from round 0", "validation margin"]
    assert words.row(1) == (1, "0.500", "0.01", "0.1") and "1.000 (" in words["gain in true reward"][2]


def test_the_figure_has_a_line_a_score_and_the_divergence_from_round_0():
    made = rounds.rounds_of(pl.DataFrame([run(1), run(2)]))
    judged = samples(1, [0.5, 0.7]).with_columns(judge=-0.4, pretrained_judge=-0.2)
    left, right = rounds.gain_by_round(rounds.by_round(made, judged)).axes
    reward, judge = left.containers
    assert reward.lines[0].get_ydata().tolist() == pytest.approx([0, 0.6])
    assert judge.lines[0].get_ydata().tolist() == pytest.approx([0, -0.2])
    assert right.containers[0].lines[0].get_xydata().tolist() == [[0, 0], [1, 0.01], [2, 0.02]]
    plt.close("all")


def test_where_nothing_is_scored_the_margin_takes_its_place():
    made = rounds.rounds_of(pl.DataFrame([run(1), run(2)]))
    table = rounds.by_round(made, samples(1, []).select(run_id=pl.lit(""), caption=pl.lit("")).clear())
    left, _ = rounds.gain_by_round(table).axes
    assert left.get_ylabel() == "margin on the validation pairs"
    assert left.containers[0].lines[0].get_ydata().tolist() == pytest.approx([0, 0.1, 0.2])
    assert rounds.in_words(table).columns == ["round", "divergence from round 0", "validation margin"]
    plt.close("all")
