"""Pairs from scores, worked out by hand."""

import numpy as np
import pytest

from workbench.evaluation.pairing import (
    PAIRINGS,
    Counts,
    Preference,
    Rule,
    agreement,
    bradley_terry,
    by_score,
    by_vote,
    combined,
    make_pairs,
)

SURE = Rule("all", "score", gap=0, tie=0, slope=1)


def couples(name, *scores):
    return PAIRINGS[name](np.array(scores, float))


def made(scores, rule=SURE, uids=None, prompts=None, seed=0):
    scores = {name: np.array(values, float) for name, values in scores.items()}
    count = len(next(iter(scores.values())))
    return make_pairs(scores, uids or [str(i) for i in range(count)], prompts or [list(range(count))], rule, seed)


def test_the_best_goes_against_the_worst_and_places_follow_the_plan():
    assert couples("best-worst", 1, 5, 3, -2) == [(1, 3)]
    assert couples("best-worst", -2, 3, 5, 1) == [(0, 2)]
    assert couples("best-worst", 7) == []


def test_halves_meet_rank_by_rank_and_the_middle_is_left_out():
    # From best to worst: 1, 4, 0, 2, 3; the better half is 1, 4, the other 2, 3.
    assert couples("halves", 3, 9, 2, 1, 5) == [(1, 2), (3, 4)]
    assert couples("halves", 3, 9, 2, 1) == [(1, 2), (0, 3)]


def test_every_two_and_fours_by_the_plan():
    assert couples("all", 0, 0, 0) == [(0, 1), (0, 2), (1, 2)]
    assert couples("fours", *range(8)) == [(0, 1), (3, 2), (0, 2), (4, 5), (7, 6), (4, 6)]
    assert couples("fours", *range(3)) == []


def test_labels_by_score_by_vote_and_drawn():
    assert [by_score(d, tie=0.5) for d in (1, -1, 0.4, 0.5)] == [1, 0, 0.5, 1]
    assert by_score(0.0, tie=0) == 0.5
    assert by_vote([3, -0.1, 2]) == 1 and by_vote([-1, 5, -1]) == 0
    assert by_vote([1, -1]) == 0.5 and by_vote([0, 0, -1]) == 0
    assert bradley_terry(np.log(3), 1, 0, 0.74) == 1 and bradley_terry(np.log(3), 1, 0, 0.76) == 0  # 3 to 1
    assert bradley_terry(-1e6, 2, 0, 0.5) == 0 and bradley_terry(1e6, 2, 0, 0.999) == 1


def test_labels_follow_bradley_terry_with_ties():
    assert bradley_terry(0.01, slope=6, tie=0.05, uniform=0.9) == 0.5
    draws = np.random.default_rng(0).random(20_000)
    share = np.mean([bradley_terry(0.3, 6, 0.05, u) for u in draws])
    assert share == pytest.approx(1 / (1 + np.exp(-1.8)), abs=0.01)
    assert {bradley_terry(-0.3, 6, 0.05, u) for u in draws} == {0.0, 1.0}


def test_pairs_stay_within_a_prompt():
    pairs = made({"a": [1, 2, 3, 5]}, prompts=[[0, 2], [1, 3]])
    assert pairs.made == [(0, 2, 0.0), (1, 3, 0.0)] and (pairs.identical, pairs.close) == (0, 0)


def test_pairs_closer_than_the_gap_are_left_out():
    pairs = made({"a": [0, 1, 3]}, Rule("all", "score", gap=2, tie=0, slope=1))
    assert pairs.made == [(0, 2, 0.0), (1, 2, 0.0)] and pairs.close == 1  # 3 and 2 apart; 1 is too close


def test_identical_images_never_make_a_pair_nor_the_same_pair_twice():
    pairs = made({"a": [0, 0, 1]}, uids=["x", "x", "y"])
    assert pairs.made == [(0, 2, 0.0)] and pairs.identical == 2  # x with x, and x with y once more
    apart = made({"a": [0, 1, 0, 1]}, uids=["x", "y", "x", "y"], prompts=[[0, 1], [2, 3]])
    assert len(apart.made) == 2  # another prompt's images may be the same


def test_what_is_left_out_changes_no_other_label():
    rule = Rule("all", "bradley-terry", gap=0, tie=0, slope=1)
    scores = {"a": np.random.default_rng(0).normal(size=40)}
    prompts = [list(range(start, start + 4)) for start in range(0, 40, 4)]
    whole = made(scores, rule, prompts=prompts)
    fewer = made(scores, rule, prompts=prompts, uids=["same", "same", *(str(i) for i in range(38))])
    assert fewer.made == [one for one in whole.made if one[:2] not in ((0, 1), (1, 2), (1, 3))]
    assert {one.label for one in whole.made} == {0, 1} and made(scores, rule, prompts=prompts, seed=1) != whole


def test_several_scorers_count_alike_whatever_their_units():
    # Standardised, both are (-1, 1, 1, -1) or its half turned: images 0 and 3 differ by what b says.
    scores = {"a": np.array([0.0, 2, 2, 0]), "b": np.array([0.0, 0, 1000, 1000])}
    np.testing.assert_allclose(combined(scores), [-1, 0, 1, 0])
    np.testing.assert_array_equal(combined({"a": scores["a"]}), scores["a"])
    np.testing.assert_allclose(combined({"a": scores["a"], "b": np.full(4, 7.0)}), [-0.5, 0.5, 0.5, -0.5])


def test_a_vote_may_contradict_the_mean():
    # Standardised, c's difference outweighs both others; two of three still prefer image 0.
    scores = {"a": [1, 0, 5, -5], "b": [1, 0, 5, -5], "c": [0, 1, 0, 0]}
    vote = Rule("all", "vote", gap=0, tie=9, slope=1)
    assert made(scores, vote, prompts=[[0, 1]]).made == [(0, 1, 1.0)]
    assert made(scores, SURE, prompts=[[0, 1]]).made == [(0, 1, 0.0)]


def test_agreement_is_counted_for_every_two_raters():
    scores = {"a": np.array([0.0, 1, 2]), "b": np.array([1.0, 1, 0])}
    labelled = [Preference(0, 1, 0.0), Preference(0, 2, 0.0), Preference(1, 2, 1.0)]
    assert agreement(labelled, scores) == [
        Counts("a", "b", 0, 2, 1),  # b sees no difference between 0 and 1
        Counts("a", "label", 2, 1, 0),
        Counts("b", "label", 1, 1, 1),
    ]
