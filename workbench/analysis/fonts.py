"""Fonts of figures: names of runs and prompts may be in any script, and no box is drawn for a letter in silence."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib import font_manager

log = logging.getLogger(__name__)

#: Fonts with other scripts than Latin, Greek and Cyrillic, as systems install them. What is there of them is asked in
#: this order for letters that matplotlib's own font lacks.
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Yu Gothic",
    "Microsoft YaHei", "SimHei", "Malgun Gothic", "Noto Sans CJK KR", "Noto Sans KR", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS", "Noto Sans Symbols 2",
    "Noto Emoji",
)  # fmt: skip


def use() -> None:
    """Let text fall back to the installed fonts of other scripts, for figures made from now on."""
    installed = set(font_manager.get_font_names())
    mpl.rcParams["font.family"] = ["sans-serif", *(name for name in FALLBACKS if name in installed)]


@contextmanager
def lacking_named() -> Iterator[None]:
    """Warn in one line of the letters for which no installed font has a glyph, where matplotlib draws boxes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    letters = set()
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) .*missing from", str(warning.message))
        if glyph:
            letters.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if letters:
        shown = "".join(sorted(letters)[:20])
        log.warning("no installed font has %s: boxes are drawn; install one that has, such as Noto Sans CJK", shown)
