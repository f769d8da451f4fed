"""The prompt grammar of the small model: what can be drawn, on which colour, in whose hand.

Every prompt is "a CONCEPT on a COLOUR background, STYLE style", so that what a prompt asks for can be checked on an
image. `split` sorts the prompts into sets that share none; `PROBES` are compositions that the model never saw.
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
    "cat": "cat-face",
    "rabbit": "rabbit-face",
    "koala": "koala",
    "tiger": "tiger-face",
    "lion": "lion",
    "cow": "cow-face",
    "monkey": "monkey-face",
    "unicorn": "unicorn",
    "chick": "hatching-chick",
    "turtle": "turtle",
    "whale": "spouting-whale",
    "snail": "snail",
    "bee": "honeybee",
    "crab": "crab",
    "parrot": "parrot",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "tulip": "tulip",
    "mushroom": "mushroom",
    "maple leaf": "maple-leaf",
    "fir tree": "evergreen-tree",
    "palm tree": "palm-tree",
    "apple": "red-apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "watermelon": "watermelon",
    "cherry": "cherries",
    "pineapple": "pineapple",
    "pear": "pear",
    "avocado": "avocado",
    "carrot": "carrot",
    "aubergine": "eggplant",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "doughnut": "doughnut",
    "cupcake": "cupcake",
    "hot dog": "hot-dog",
    "pretzel": "pretzel",
    "ice cream": "soft-ice-cream",
    "car": "automobile",
    "bus": "bus",
    "rocket": "rocket",
    "sailboat": "sailboat",
    "helicopter": "helicopter",
    "house": "house",
    "tent": "tent",
    "umbrella": "umbrella",
    "football": "soccer-ball",
    "guitar": "guitar",
    "camera": "camera",
    "crown": "crown",
    "robot": "robot",
    "ghost": "ghost",
    "snowman": "snowman-without-snow",
    "bell": "bell",
}

#: Background colour -> sRGB, 0 to 255.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 64, 62),
    "orange": (240, 152, 60),
    "yellow": (246, 218, 96),
    "green": (92, 178, 98),
    "teal": (44, 148, 148),
    "blue": (78, 138, 222),
    "purple": (148, 98, 190),
    "pink": (242, 164, 196),
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
        return f"{_with_article(self.concept)} on {_with_article(self.colour)} background, {self.style} style"


def _with_article(noun: str) -> str:
    """A noun after "a" or "an", by its sound: an umbrella, but a unicorn."""
    return f"{'an' if noun[0] in 'aeio' or noun.startswith('um') else 'a'} {noun}"


_CAPTION = re.compile(r"^an? (?P<concept>.+) on an? (?P<colour>\w+) background, (?P<style>\w+) style$")


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


#: Concepts that the model never saw in one of the three styles -> that style.
UNSEEN: dict[str, str] = dict(
    zip(
        ("fox", "owl", "tiger", "bee", "cactus", "apple", "pineapple", "doughnut", "rocket", "car", "crown", "robot"),
        itertools.cycle(STYLES),
    )
)


def split() -> dict[str, list[Prompt]]:
    """All prompts in sets: of each concept two styles give one colour each to test and to validation.

    Returns:
        {"train": 1544 prompts, "validation": 128, "test": 128, "unseen": 120}, always the same; "unseen" are the
        concepts of `UNSEEN` in the style that they were never seen in.
    """
    # The order of the draws below decides the sets. The shipped pairs rest on it: do not change it.
    rng = random.Random(0)
    sets: dict[str, list[Prompt]] = {"train": [], "validation": [], "test": [], "unseen": []}
    for concept in CONCEPTS:
        seen = [style for style in STYLES if UNSEEN.get(concept) != style]
        tested, validated = rng.sample(seen, 2), rng.sample(seen, 2)
        for style in STYLES:
            colours = rng.sample(list(COLOURS), len(COLOURS))
            for name, chosen in (("test", tested), ("validation", validated), ("unseen", [UNSEEN.get(concept)])):
                if style in chosen:
                    taken = colours[:] if name == "unseen" else [colours.pop()]
                    sets[name] += [Prompt(concept, colour, style) for colour in taken]
            if style in seen:
                sets["train"] += [Prompt(concept, colour, style) for colour in colours]
    return sets


def probes() -> dict[str, list[str]]:
    """Captions of compositions that were never trained.

    Returns:
        {"unseen style": a concept in the one style that it was never seen in, "two of a kind": "two foxes on ...",
        "two kinds": "a fox and a panda on ..."}. The last two lie outside the grammar: `parse` refuses them.
    """
    rng = random.Random(1)
    unseen = {p.concept: p for p in split()["unseen"]}
    pairs = [rng.sample(list(CONCEPTS), 2) for _ in range(12)]
    tail = lambda: f"on {_with_article(rng.choice(list(COLOURS)))} background, {rng.choice(STYLES)} style"  # noqa: E731
    return {
        "unseen style": [str(p) for p in unseen.values()],
        "two of a kind": [f"two {_plural(a)} {tail()}" for a, _ in pairs],
        "two kinds": [f"{_with_article(a)} and {_with_article(b)} {tail()}" for a, b in pairs],
    }


def _plural(noun: str) -> str:
    """The plural of a concept."""
    if noun.endswith("leaf"):
        return noun[:-1] + "ves"
    if noun.endswith("snowman"):
        return "snowmen"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
