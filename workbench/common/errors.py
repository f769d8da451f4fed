"""The two kinds of failure that end a command with one line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: names the key, the value and what is accepted. Exit code 2."""


class Failure(RuntimeError):
    """Something the command needs did not work: names the thing and the remedy. Exit code 1."""


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: Any) -> str:
    """A value as a message shows it: its middle left out where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-30:]}"


def on_one_line(text: str) -> str:
    """A message for a terminal: one line, no control characters, its middle left out where it is long."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return clean if len(clean) <= 1000 else f"{clean[:800]} ... {clean[-150:]}"


def pass_on_interrupt(error: BaseException) -> None:
    """Raise the interrupt that made a library fail, where it was one.

    A KeyboardInterrupt that arrives while compiled code has called back into Python comes out as that library's own
    error, such as the RuntimeError of torch's zip writer, with the interrupt as its context.

    Raises:
        KeyboardInterrupt: it was the cause, or another exception that is no error, such as SystemExit.
    """
    before: BaseException | None = error
    while before is not None:
        if not isinstance(before, Exception):
            raise before.with_traceback(None) from None
        before = before.__cause__ or before.__context__


OUT_OF_MEMORY = (
    "out of memory. What to change, in this order: lower train.batch_size and raise train.accumulation by the same "
    "factor; lower diagnostics.batch_size and evaluation.batch_size (or --batch-size); train.checkpointing=true keeps "
    "fewer activations, model.dtype=bfloat16 halves them; train.optimizer=adamw_8bit or adafactor shrinks the "
    "optimizer, adamw_paged moves it out; lora.rank=8 trains adapters alone; train.parallel=fsdp shares the weights "
    "among GPUs"
)


@contextmanager
def memory_explained() -> Iterator[None]:
    """What torch says when a device, or the machine, has no memory left becomes one line; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        # By name and text, as torch is not imported here: commands that need none of it start fast.
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error):
            raise Failure(OUT_OF_MEMORY) from None
        raise


@contextmanager
def said() -> Iterator[None]:
    """Print a UserError as one line and go on: a notebook shows what its data allow, and says what they do not."""
    try:
        yield
    except UserError as error:
        print(f"Not shown: {error}")
