"""A `mlflow server` on this machine alone, in a process of its own, that can be stopped and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import requests


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class TrackingServer:
    """A `mlflow server` that runs while the context lasts.

    Args:
        folder: gets its artifacts and its log.
        database: URL of its backend store; empty = sqlite in the folder.
        patience: seconds for its start.
    """

    def __init__(self, folder: Path, database: str = "", patience: float = 120.0):
        self.folder, self.port, self.patience = folder, free_port(), patience
        self.database = database or f"sqlite:///{folder / 'server.db'}"
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "TrackingServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, wait: bool = True) -> None:
        """Start the server, or start it again on the same port and database.

        Args:
            wait: until it answers.
        Raises:
            RuntimeError: it does not start; with the end of its log.
        """
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 processes instead of 15
            "MLFLOW_BACKEND_STORE_URI": self.database,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        # On this machine alone: the server asks for no password.
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        options += ["--artifacts-destination", str(self.folder / "artifacts")]
        output = self.folder / "server.log"
        with output.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options],
                cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + self.patience
        while wait and not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                said = output.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"the tracking server does not start: {said}")
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether the server answers requests."""
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self) -> None:
        """Kill the server with all processes that it started: its whole session, since it leaves children behind."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
            self._process = None
