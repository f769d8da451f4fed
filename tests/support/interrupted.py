"""An interrupt at chosen lines of the workbench's code, each in a copy of the process that goes no further."""

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

import workbench

PACKAGE = str(Path(workbench.__file__).parent)


class Tracer:
    """Sees each line of the workbench's code before it is run, while `armed`.

    Attributes:
        lines: (file, number) of every line so far, in the order in which they were run.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.armed = False

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, argument):
        if self.armed and event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            self.reached(len(self.lines) - 1)
        return self._line

    def reached(self, index: int) -> None:
        """Called before each line."""


class Interrupts(Tracer):
    """Forks the process before each of the chosen lines, and raises KeyboardInterrupt in the copy.

    The copy works on a copy of a folder, since the process itself goes on. It is waited for, and ends where the
    interrupt comes out of `run`.

    Args:
        folder: what the process writes to, as a path relative to the working folder.
        places: where the copies of it go, each under the number of its line.
        chosen: numbers of lines, counted from the first one that is seen.
    """

    def __init__(self, folder: Path, places: Path, chosen: Collection[int]):
        super().__init__()
        self.folder, self.places, self.chosen = folder, places, set(chosen)
        self.process = os.getpid()

    def run(self, call: Callable[[], None]) -> None:
        """Call a function, once to its end, and once up to each of the lines.

        Raises:
            AssertionError: something else than the interrupt came out of it in a copy.
        """
        try:
            with self:
                call()
        except BaseException as error:
            if os.getpid() == self.process:
                raise
            if not isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
            os._exit(not isinstance(error, KeyboardInterrupt))
        if os.getpid() != self.process:
            os._exit(1)

    def reached(self, index: int) -> None:
        if index not in self.chosen:
            return
        child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            file, line = self.lines[index]
            assert code == 0, f"an interrupt at {file}:{line} came out as something else"
            return
        self.armed = False
        place = self.places / str(index)
        shutil.copytree(self.folder, place / self.folder)
        os.chdir(place)
        self._own_open_files()
        raise KeyboardInterrupt

    def _own_open_files(self) -> None:
        """Give this copy of the process files of its own where it shares open ones with the original."""
        for name in os.listdir("/proc/self/fd"):
            path = Path(os.readlink(f"/proc/self/fd/{name}")) if os.path.lexists(f"/proc/self/fd/{name}") else Path()
            if path.parent.name == self.folder.name and path.is_file():
                own = os.open(self.folder / path.name, os.O_RDWR)
                os.lseek(own, os.lseek(int(name), 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(own, int(name))
