from collections import Counter

import pytest

from workbench.models.small.artwork import PACKAGES, over
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES, UNSEEN, Prompt, parse, probes, split


def test_a_caption_says_what_its_prompt_says():
    for prompts in split().values():
        for prompt in prompts:
            assert parse(str(prompt)) == prompt


@pytest.mark.parametrize(
    "caption", ["a fox", "a dragon on a red background, noto style", "a fox on a violet background, noto style", ""]
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="caption"):
        parse(caption)


def test_the_sets_share_no_prompt_and_test_and_validation_show_every_concept_twice():
    sets = split()
    everything = [p for prompts in sets.values() for p in prompts]
    assert len(set(everything)) == len(everything) == len(CONCEPTS) * len(COLOURS) * len(STYLES)
    for name in ("test", "validation"):
        assert Counter(p.concept for p in sets[name]) == dict.fromkeys(CONCEPTS, 2)
    assert {p.concept for p in sets["train"]} == set(CONCEPTS)
    assert split() == sets


def test_what_is_unseen_is_in_no_other_set():
    sets = split()
    unseen = {(p.concept, p.style) for p in sets["unseen"]}
    assert unseen == set(UNSEEN.items())
    assert not unseen & {(p.concept, p.style) for n in ("train", "validation", "test") for p in sets[n]}


def test_probes_outside_the_grammar_are_refused_and_the_others_not():
    found = probes()
    assert all(parse(c).style == UNSEEN[parse(c).concept] for c in found["unseen style"])
    for caption in found["two of a kind"] + found["two kinds"]:
        with pytest.raises(ValueError, match="caption"):
            parse(caption)


def test_a_caption_reads_like_one():
    assert str(Prompt("fox", "blue", "noto")) == "a fox on a blue background, noto style"
    assert str(Prompt("umbrella", "orange", "noto")) == "an umbrella on an orange background, noto style"
    assert str(Prompt("unicorn", "red", "noto")).startswith("a unicorn ")


def test_every_style_has_its_pinned_and_licensed_package():
    assert set(PACKAGES) == set(STYLES)
    assert {p.licence for p in PACKAGES.values()} == {"Apache-2.0", "MIT", "CC-BY-4.0"}


def test_a_drawing_lies_over_its_ground():
    import torch

    rgba = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    rgba[0, :, 0, 0] = torch.tensor([255, 0, 0, 255])  # one opaque red pixel
    image = over(rgba, torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1))
    assert image[0, :, 0, 0].tolist() == [1, 0, 0] and image[0, :, 1, 1].tolist() == [0, 0, 1]
