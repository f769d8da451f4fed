"""`python -m tests.support.bare_machine MODULE ARGUMENTS [+ MODULE ARGUMENTS]...`: run modules, one after the other,
as on a machine that can train and no more.

Nothing can be imported but the standard library, this repository, the packages named here and what they need.
"""

import re
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import MetadataPathFinder, PackageNotFoundError, packages_distributions, requires
from types import ModuleType
from typing import Any

THERE = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pyarrow", "pillow", "numpy", "click",
    "pydantic", "tqdm", "filelock", "psutil",
)  # fmt: skip


def with_needs(names: Sequence[str]) -> set[str]:
    """Distributions and all that they need, without their extras."""
    found: set[str] = set()
    waiting = [name.lower().replace("_", "-") for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:  # for another platform or Python
            continue
        plain = [need for need in needs if "extra ==" not in need]
        waiting += [re.match(r"[\w.-]+", need)[0].lower().replace("_", "-") for need in plain]  # type: ignore[index]
    return found


class Only:
    """A finder on the path that does not see what is missing on such a machine."""

    def __init__(self) -> None:
        there = with_needs(THERE)
        self.missing = {
            module
            for module, distributions in packages_distributions().items()
            if not {name.lower().replace("_", "-") for name in distributions} & there
        } - {"workbench", "tests"}

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What Python's own finder says, or None."""
        return None if name.partition(".")[0] in self.missing else PathFinder.find_spec(name, path, target)

    find_distributions = staticmethod(
        MetadataPathFinder.find_distributions
    )  # libraries ask for the versions of what is there


if __name__ == "__main__":
    sys.meta_path[:] = [Only() if finder is PathFinder else finder for finder in sys.meta_path]
    waiting = sys.argv[1:]
    while waiting:
        end = waiting.index("+") if "+" in waiting else len(waiting)
        sys.argv, waiting = waiting[:end], waiting[end + 1 :]
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code:
                raise
