"""The prompt grammar of the small model: what can be drawn, on which colour, in whose hand.

Every prompt is "a CONCEPT on a COLOUR background, STYLE style", so that what a prompt asks for can be
checked on an image. The 576 prompts fall into three sets that share no prompt.
"""

import itertools
import random
import re
from typing import NamedTuple

#: Concept as it stands in a prompt -> slug of the drawing in all three icon sets.
CONCEPTS: dict[str, str] = {
    "fox": "fox",
    "panda": "panda",
    "frog": "frog",
    "pig": "pig-face",
    "penguin": "penguin",
    "owl": "owl",
    "octopus": "octopus",
    "butterfly": "butterfly",
    "ladybird": "lady-beetle",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "mushroom": "mushroom",
    "apple": "red-apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "watermelon": "watermelon",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "car": "automobile",
    "rocket": "rocket",
    "sailboat": "sailboat",
    "house": "house",
    "umbrella": "umbrella",
    "football": "soccer-ball",
}

#: Background colour -> sRGB, 0 to 255.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 64, 62),
    "orange": (240, 152, 60),
    "yellow": (246, 218, 96),
    "green": (92, 178, 98),
    "blue": (78, 138, 222),
    "purple": (148, 98, 190),
    "white": (244, 244, 244),
    "black": (40, 40, 46),
}

#: Style as it stands in a prompt: the icon set whose artists drew it.
STYLES: tuple[str, ...] = ("noto", "fluent", "twemoji")


class Prompt(NamedTuple):
    """What a prompt asks for; `str(prompt)` is the caption."""

    concept: str
    colour: str
    style: str

    def __str__(self) -> str:
        return f"a {self.concept} on a {self.colour} background, {self.style} style"


_CAPTION = re.compile(r"^a (?P<concept>.+) on a (?P<colour>\w+) background, (?P<style>\w+) style$")


def parse(caption: str) -> Prompt:
    """The prompt that a caption states.

    Raises:
        ValueError: the caption is not of the grammar, or names an unknown concept, colour or style.
    """
    match = _CAPTION.match(caption)
    if match is None:
        raise ValueError(f"caption {caption!r}: expected 'a CONCEPT on a COLOUR background, STYLE style'")
    prompt = Prompt(**match.groupdict())
    for value, known in ((prompt.concept, CONCEPTS), (prompt.colour, COLOURS), (prompt.style, STYLES)):
        if value not in known:
            raise ValueError(f"caption {caption!r}: {value!r} is not one of {', '.join(known)}")
    return prompt


def split() -> dict[str, list[Prompt]]:
    """All prompts in three sets: of each concept in each style, six colours train, one each the others.

    Returns:
        {"train": 432 prompts, "validation": 72, "test": 72}, always the same.
    """
    rng = random.Random(0)
    sets: dict[str, list[Prompt]] = {"train": [], "validation": [], "test": []}
    for concept, style in itertools.product(CONCEPTS, STYLES):
        test, validation, *train = rng.sample(list(COLOURS), len(COLOURS))
        sets["test"].append(Prompt(concept, test, style))
        sets["validation"].append(Prompt(concept, validation, style))
        sets["train"] += [Prompt(concept, colour, style) for colour in train]
    return sets
