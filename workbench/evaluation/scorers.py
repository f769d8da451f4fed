"""Scorers by name: the reward models whose weights are found or fetched, and functions of the user's own.

A function of the user's own takes images and prompts and gives one number an image, higher for better:

    def warmth(images, prompts):                            # mine.py; named as --scorer mine.py:warmth
        return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))

`training.plugins` has the rules by which its file is run: only where a user names it, and pinned by a digest.
"""

import inspect
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.common.cache import digest
from workbench.common.errors import Failure, UserError, one_line, shown
from workbench.common.validation import is_place
from workbench.evaluation.reward_models import REWARD_MODELS, Files, Images, Part, RewardModel, Scorer
from workbench.models import ASSETS, HUB_ID, digest_of
from workbench.training import plugins

#: What a scorer of the user's own cannot be called: its scores are a column (`sample_store`, `pair_files`), and tables
#: and pairs have columns of these names, or of these with _0 and _1 behind them.
TAKEN = frozenset({
    "model", "prompts", "row", "prompt", "category", "seed", "image", "uid", "steps", "guidance", "average", "label",
    "score", "jpg",
})  # fmt: skip


@dataclass(frozen=True)
class Located:
    """A scorer whose files are on this machine, not loaded yet.

    Attributes:
        source: as it was named: a folder, a hub id, the user's own function with its file's digest; empty = the
            published weights.
        kind: what is known of it.
        files: of its parts; none where it is a function of the user's own.
    """

    name: str
    source: str
    kind: RewardModel
    files: Files

    @property
    def digest(self) -> str:
        """Digest of all that decides its scores."""
        if not self.files:
            return digest("own-scorer-1", self.source)  # the source has the digest of the code
        return digest_of([path for paths in self.files.values() for path in paths])

    def check(self, prompts: Sequence[str]) -> None:
        """Raise UserError for prompts that it cannot judge."""
        self.kind.check(prompts)

    def load(self, device: torch.device, batch_size: int = 32) -> Scorer:
        """Load it; a reward model's scores do not depend on the batch size but for rounding.

        Raises:
            UserError: the files are not the weights that the reward model needs.
        """
        return self.kind.load(self.files, device, batch_size)


def with_sources(texts: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """Scorers as options name them, each as NAME=SOURCE.

    Args:
        texts: NAME, NAME=SOURCE, or FILE.py:FUNCTION, whose name is the function's; paths of files count from the
            working folder, unless they have their digest already.
        known: name -> the source that it has where only the name is given.
    Raises:
        UserError: there is no such file.
    """
    found = []
    for text in texts:
        name, equals, source = text.partition("=")
        given = source if equals else text
        own = None if name in REWARD_MODELS else plugins.OWN.fullmatch(given)
        if own:
            name = name if equals else own["function"]
            source = given if own["digest"] else plugins.pinned(given, Path(), f"--scorer {name}")
        elif not equals:
            source = (known or {}).get(name, "")
        found.append(f"{name}={source}")
    return found


def heading(name: str) -> str:
    """A scorer's name in tables."""
    return REWARD_MODELS[name].heading if name in REWARD_MODELS else name


def locate(name: str, source: str = "") -> Located:
    """Find a scorer; files of a reward model that are not on this machine are fetched from the hub.

    Args:
        name: a key of REWARD_MODELS, or any name for a function of the user's own.
        source: folder, or hub id of the first part; empty = the published weights. In a folder each part lies in a
            subfolder of its name or in the folder itself; parts that it lacks, but for the first, come from the hub.
            Or a function of the user's own, as `plugins.pinned` returns it.
    Raises:
        UserError: no such scorer, or the folder lacks its first part, or the function may not be run.
        Failure: the hub does not answer.
    """
    if name not in REWARD_MODELS:
        if not plugins.OWN.fullmatch(source):
            known = ", ".join(REWARD_MODELS)
            raise UserError(f"--scorer {name!r}: expected one of {known}, or a function of your own, FILE.py:FUNCTION")
        return Located(name, source, _own(name, source), {})
    option = f"--scorer {name}={source}" if source else f"--scorer {name}"
    place = source or (str(ASSETS) if name == "reward" else "")
    if not is_place(place):
        raise UserError(f"{option}: no file or folder has such a name")
    if place and not Path(place).is_dir() and not HUB_ID.fullmatch(place):
        raise UserError(f"{option}: no such folder, and not a hub id")
    local = Path(place) if place and Path(place).is_dir() else None
    located = {}
    for i, (name_of_part, part) in enumerate(REWARD_MODELS[name].parts.items()):
        places = [local / name_of_part, local] if local else []
        files = next((files for files in map(part.used, places) if files), [])
        if not files and local and (i == 0 or not part.hub):
            wanted = " or ".join(" and ".join(patterns) for patterns in part.accepted)
            raise UserError(f"{option}: neither the folder nor {name_of_part}/ in it has {wanted}")
        located[name_of_part] = files or _fetch(place if place and not local and i == 0 else part.hub, part, option)
    return Located(name, source, REWARD_MODELS[name], located)


def _fetch(repository: str, part: Part, option: str) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(part.fetched)))
    except RepositoryNotFoundError:
        raise UserError(f"{option}: the hub has no {repository} (a private one needs HF_TOKEN)") from None
    except (OSError, ValueError) as error:
        raise Failure(
            f"{option}: the hub could not be reached for {repository}; name a local folder, --scorer NAME=FOLDER, or "
            f"try again ({one_line(error)[:200]})"
        ) from None
    files = part.used(folder)
    if not files:
        raise UserError(f"{option}: {repository} has none of {', '.join(part.fetched)}")
    return files


# --- functions of the user's own ------------------------------------------------------------------------------


def _own(name: str, choice: str) -> RewardModel:
    """A function of the user's own in the form of a reward model.

    Raises:
        UserError: it may not be run, is not there, or does not take images and prompts; or it has a bad name.
    """
    option = f"--scorer {name}"
    if not name.isidentifier() or name in TAKEN:
        raise UserError(
            f"{option}={choice}: its scores are a column of this name, so a name has letters, digits and '_', and is "
            f"none of {', '.join(sorted(TAKEN))}; give another, --scorer NAME=FILE.py:FUNCTION"
        )
    function = plugins.load(choice, option)
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise UserError(f"{option} = {shown(choice)}: expected a function of images and prompts ({error})") from None
    place = choice.partition(":")[0]

    @torch.no_grad()
    def scores(images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        try:
            # By torch, so that lists, arrays and tensors on any device will do.
            return torch.as_tensor(function(images, prompts)).detach().double().cpu().numpy()
        except (UserError, Failure, torch.OutOfMemoryError):
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename.endswith(place)]
            where = f"{place}, line {lines[-1]}" if lines else place
            raise Failure(f"{option}: {type(error).__name__} in {where}: {one_line(error)}") from None

    return RewardModel(name, {}, lambda files, device, batch_size: scores)
