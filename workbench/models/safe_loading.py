"""Reading network weights that may come from anybody: files and configs are checked before a library acts on them.

diffusers and transformers build whatever a config.json describes, so a damaged or hostile folder could fill the memory,
run a pickle or raise anything at all. Here nothing is unpickled, no path leads out of the folder, a config may not
describe more than the weights beside it can fill, and whatever still goes wrong becomes one line for the user.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from workbench.common.errors import Failure, UserError, one_line, shown
from workbench.common.reading import require_regular

#: Bytes that a JSON file may have; real configs take a few kilobytes.
LONGEST_JSON = 2**20


@contextmanager
def explained(what: str, failing: str = "cannot be loaded") -> Iterator[None]:
    """Turn whatever a library raises over files that it cannot read into a UserError of one line.

    Args:
        what: the thing being read, with which the line begins.
        failing: what the line says of it.
    """
    try:
        yield
    except (UserError, Failure):
        raise
    except Exception as error:  # diffusers, transformers, tokenizers and peft raise all kinds, and plain Exception
        if "out of memory" in str(error):  # no fault of the files; `memory_explained` says what to change
            raise
        raise UserError(f"{what} {failing} ({one_line(error)})") from None


def read_json(path: Path, what: str, longest: int = LONGEST_JSON) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        what: the thing that the file describes, for messages.
        longest: bytes that such a file may have.
    Raises:
        UserError: the file is missing, no regular one, too long, or holds something else than an object.
    """
    require_regular(path, what)
    try:
        # The size first: a hostile file would fill the memory before it is found to be no JSON.
        if path.stat().st_size > longest:
            raise UserError(f"{what}: {path.name} is too long to be what it should be")
        # utf-8-sig: editors on Windows put a byte order mark first, over which json fails.
        content = json.loads(path.read_text("utf-8-sig"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise UserError(f"{what}: {path.name} cannot be read ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path.name} holds {shown(content)}, not an object")
    return content


def load_network(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """A network with all of its weights, each a finite number.

    Args:
        kind: class of diffusers or transformers.
        folder: holds config.json and safetensors.
        what: the network, for messages.
        options: further arguments of `from_pretrained`.
    Raises:
        UserError: the weights are damaged, incomplete, not finite, or of other shapes than config.json says.
    """
    # Before from_pretrained, which allocates what the config describes.
    check_weights(folder, what, options.get("variant", ""))
    with explained(what):
        network, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    # The libraries only warn of these two and fill the gaps with random numbers: a model that is silently wrong.
    for key, problem in (
        ("missing_keys", "is not there"),
        ("mismatched_keys", "has another shape than config.json says"),
    ):
        if info.get(key):
            first = sorted(name if isinstance(name, str) else name[0] for name in info[key])[0]
            raise UserError(f"{what}: {first} {problem} ({len(info[key])} in all)")
    require_finite(network, what)
    return network


def require_finite(network: Any, what: str) -> None:
    """Raise UserError unless every weight of a network is a finite number."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{what}: {name} has values that are not finite")


def check_weights(folder: Path, what: str, variant: str = "") -> None:
    """Check the headers of a network's weight files and its config, before a library builds what they describe.

    Raises:
        UserError: a file cannot be read, lies outside the folder or holds no floating-point weights, or config.json
            describes a larger network than the files can fill.
    """
    for index in folder.glob("*.index*.json"):  # lists the files of a network that is too large for one
        listed = read_json(index, what).get("weight_map")
        for name in listed.values() if isinstance(listed, dict) else [listed]:
            if not (isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")):
                raise UserError(f"{what}: {index.name} names {shown(name)}, not a safetensors file beside it")
    files = sorted(folder.glob("*.safetensors"))
    shapes = read_shapes([path for path in files if variant and f".{variant}" in path.name] or files, what)
    if not shapes:
        raise UserError(f"{what}: no weights in safetensors in {folder}")
    check_declared(read_json(folder / "config.json", what), shapes, what)


def read_shapes(files: Sequence[Path], what: str) -> dict[str, list[int]]:
    """Shapes of the tensors in safetensors files, by name; only the files' headers are read.

    Raises:
        UserError: a file cannot be read, or holds weights that are no floating-point numbers.
    """
    shapes: dict[str, list[int]] = {}
    for path in files:
        require_regular(path, what)
        with explained(f"{what}: {path.name}"), safe_open(path, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (no mapping)
                tensor = stream.get_slice(name)
                # Weights are told from buffers, such as integer position ids, by the end of their names.
                if name.endswith(("weight", "bias")) and not re.match("B?F", tensor.get_dtype()):
                    raise UserError(f"{what}: {name} is stored as {tensor.get_dtype()}, expected floating point")
                shapes[name] = tensor.get_shape()
    return shapes


def check_declared(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Check that a config describes no larger network than its weights can fill.

    A library allocates what the config says before it looks at the weights; a width of 10^9 would end the process.

    Args:
        shapes: of the tensors beside the config, by name.
    Raises:
        UserError: it counts more layers than there are tensors, or a number exceeds the largest tensor's size.
    """
    most = max(2**16, *(math.prod(shape) for shape in shapes.values()))

    def check(key: str, value: Any) -> None:
        if key.endswith(("_id", "_ids", "theta")):  # which token, how fast positions turn: no sizes
            return
        # A position embedding has pos_embed_max_size^2 entries.
        largest = len(shapes) if "layers" in key else math.isqrt(most) if key == "pos_embed_max_size" else most
        if isinstance(value, int | float) and abs(value) > largest:
            raise UserError(f"{what}: {key} = {shown(value)} in its config, which is more than its weights hold")
        if isinstance(value, list) and len(value) > max(64, len(shapes)):
            raise UserError(f"{what}: {key} in its config has {len(value)} entries, more than its weights have tensors")
        for name, inner in value.items() if isinstance(value, dict) else ():
            check(name, inner)
        for inner in value if isinstance(value, list) else ():
            check(key, inner)

    check("config", config)
