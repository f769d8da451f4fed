"""What the commands share: options, one-line errors, quiet libraries."""

import functools
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from workbench.common.errors import Failure, UserError, memory_explained, on_one_line, shown
from workbench.common.paths import places_explained, shipped
from workbench.common.secrets import hide_passwords
from workbench.common.streams import lost_output, make_sturdy
from workbench.common.validation import whole_number


def one_process() -> None:
    """Refuse to start on several processes; for commands that are not one run.

    Raises:
        UserError: a launcher of distributed runs has started it.
    """
    if whole_number("WORLD_SIZE", 1, least=1) > 1:
        raise UserError(
            "started on several processes (WORLD_SIZE): torchrun and accelerate launch share one run, python -m "
            "workbench.train; a study's workers are processes of their own: start the same command on each machine"
        )


def command(function: Callable, group: click.Group | None = None, name: str | None = None) -> click.Command:
    """A click command whose help is the function's docstring and whose known failures are one line, not a traceback.

    Args:
        group: of which it is one, by that name.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        # Before `quiet`, whose log handler keeps the standard error that it finds.
        make_sturdy()
        quiet()
        for name in ("SIGTERM", "SIGHUP"):  # schedulers and closed terminals stop jobs so
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup lets it be
                signal.signal(number, _interrupt)
        try:
            _check_variables()
            with memory_explained(), places_explained():
                function(*args, **kwargs)
            # Asked last: lost output does not stop the work, but must not pass for success.
            if error := lost_output():
                raise Failure(f"standard output: not all could be written ({error.strerror})")
        except UserError as error:
            _complain(error)
            sys.exit(2)
        except (Failure, FloatingPointError) as error:
            _complain(error)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            # 128 + the number of SIGINT, as shells report it.
            sys.exit(130)

    make = group.command if group else click.command
    return make(name, context_settings={"max_content_width": 100})(guarded)


def _check_variables() -> None:
    """Check the environment variables that libraries read as numbers, over which they would end in a traceback.

    Raises:
        UserError: one is no number.
    """
    for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL", "TQDM_MINITERS", "TQDM_SMOOTHING", "TQDM_DELAY", "TQDM_NCOLS"):
        try:
            float(os.environ.get(name) or 0)
        except ValueError:
            raise UserError(f"{name} = {shown(os.environ[name])}: expected a number") from None


def _complain(error: BaseException) -> None:
    """One line, with the process's number where a launcher has started several."""
    rank = os.environ.get("RANK", "0")
    click.echo(
        f"Error{'' if rank == '0' else f' (process {rank})'}: {hide_passwords(on_one_line(str(error)))}", err=True
    )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt  # and no SIGINT, which a shell's background jobs ignore


def quiet() -> None:
    """Keep libraries' notices and progress bars off the terminal, and their telemetry off the network."""
    # Variables, not calls: libraries read them when they are imported, which comes later, and child processes inherit
    # them. setdefault, so that the user's own values stay.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads on busy cores cost far more than they win
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "10")  # keep logs of batch jobs short
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*(experimental feature|is experimental).*")  # Optuna
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # two sets of adapters
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # float16 left a first step out
    handler = logging.StreamHandler()
    handler.setFormatter(_Discreet("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # What nobody has caught is printed by these, past the log's formatter; both leave passwords out.
    sys.excepthook = lambda kind, error, trace: print_uncaught(error)
    threading.excepthook = lambda what: print_uncaught(what.exc_value)


class _Discreet(logging.Formatter):
    """Log lines without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_passwords(super().format(record))


def print_uncaught(error: BaseException | None) -> None:
    """A fault of ours, as Python would show it, but for passwords in URLs that libraries put into their messages."""
    if error is not None:
        sys.stderr.write(hide_passwords("".join(traceback.format_exception(error))))


def silence_transformers() -> None:
    """Switch off the progress bars of weights being loaded, over which the environment has no say."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()


def _shipped_where_missing(context: click.Context, argument: click.Parameter, path: Path | None) -> Path | None:
    """Let `experiments/NAME.toml` name the workbench's own file in folders that have no such file.

    So the commands of the documentation work in a checkout and after a plain installation alike.
    """
    if path is not None and path.parent == Path("experiments") and not path.exists() and shipped(path).is_file():
        return shipped(path)
    return path


experiment_argument = click.argument(
    "experiment", type=click.Path(path_type=Path), default=None, required=False, metavar="[EXPERIMENT.toml]",
    callback=_shipped_where_missing,
)  # fmt: skip
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting by its dotted name, e.g. reference.interval=16. Repeatable.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto = a GPU where there is one."
)
workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Worker processes. Default: the CPU's cores, at most 8; 1 on a GPU."
)


def default_workers(device: str) -> int:
    """Worker processes where the user says nothing: the CPU's cores, at most 8; one on a GPU."""
    from workbench.common.distributed import pick_device
    from workbench.common.processes import cores

    if pick_device(device).type != "cpu":
        return 1
    return min(cores(), 8)


def this_command() -> str:
    """The command that runs now, as somebody could give it again, without passwords.

    In a worker process it is the command that started the worker.
    """
    program, *arguments = sys.argv
    module = Path(program)
    if module.parent.name == "workbench" and module.suffix == ".py":  # python -m gives the module's path
        called = ["python", "-m", "workbench" if module.stem == "__main__" else f"workbench.{module.stem}"]
    else:
        called = [module.name or "python"]
    return hide_passwords(shlex.join([*called, *arguments]))


def this_python() -> str:
    """How the user can call the interpreter that runs now, quoted for a shell."""
    relative = os.path.relpath(sys.executable)
    return "python" if relative.startswith("..") else shlex.quote(relative)
