import pytest

from workbench.models.small.artwork import PACKAGES, compose
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES, Prompt, parse, split


def test_a_caption_says_what_its_prompt_says():
    for prompts in split().values():
        for prompt in prompts:
            assert parse(str(prompt)) == prompt


@pytest.mark.parametrize(
    "caption", ["a fox", "a dragon on a red background, noto style", "a fox on a teal background, noto style", ""]
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="caption"):
        parse(caption)


def test_the_sets_share_no_prompt_and_each_covers_every_concept_in_every_style():
    sets = split()
    everything = [p for prompts in sets.values() for p in prompts]
    assert len(set(everything)) == len(everything) == len(CONCEPTS) * len(COLOURS) * len(STYLES)
    for prompts in sets.values():
        assert {(p.concept, p.style) for p in prompts} == {(c, s) for c in CONCEPTS for s in STYLES}
    assert split() == sets


def test_a_caption_reads_like_one():
    assert str(Prompt("fox", "blue", "noto")) == "a fox on a blue background, noto style"


def test_every_style_has_its_pinned_and_licensed_package():
    assert set(PACKAGES) == set(STYLES)
    assert {p.licence for p in PACKAGES.values()} == {"Apache-2.0", "MIT", "CC-BY-4.0"}


def test_compose_puts_the_drawing_over_the_background():
    import torch

    rgba = torch.zeros(1, 4, 2, 2)
    rgba[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0])  # one opaque red pixel
    image = compose(rgba, torch.tensor([[0.0, 0.0, 1.0]]))
    assert image[0, :, 0, 0].tolist() == [1, -1, -1] and image[0, :, 1, 1].tolist() == [-1, -1, 1]
