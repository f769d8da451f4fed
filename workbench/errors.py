"""The two kinds of failure that end a command with one line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: names the key, the value and what is accepted. Exit code 2."""


class Failure(RuntimeError):
    """Something the command needs did not work: names the thing and the remedy. Exit code 1."""


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


OUT_OF_MEMORY = (
    "out of memory. What to change, in this order: lower train.batch_size and raise train.accumulation by the same "
    "factor; lower diagnostics.batch_size and evaluation.batch_size (or --batch-size); train.checkpointing=true keeps "
    "fewer activations, model.dtype=bfloat16 halves them; train.optimizer=adamw_8bit or adafactor shrinks the "
    "optimizer; lora.rank=8 trains adapters alone; train.parallel=fsdp shares the weights among GPUs"
)


@contextmanager
def memory_explained() -> Iterator[None]:
    """What torch says when a device, or the machine, has no memory left becomes one line; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error):
            raise Failure(OUT_OF_MEMORY) from None
        raise


@contextmanager
def said() -> Iterator[None]:
    """What the data cannot show is said in a line, and the notebook goes on."""
    try:
        yield
    except UserError as error:
        print(f"Not shown: {error}")
