"""A real `mlflow server` of the tests' own, on a free port of 127.0.0.1, that can be stopped and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests

from tests.support.postgres import free_port


class Server:
    """`folder` gets its artifacts and its log; `database` is its backend store."""

    def __init__(self, folder: Path, database: str):
        self.folder, self.database, self.port = folder, database, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, wait: bool = True) -> None:
        """Start it, or start it again."""
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_BACKEND_STORE_URI": self.database,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        options += ["--artifacts-destination", str(self.folder / "artifacts")]
        said = self.folder / "server.log"
        with said.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options],
                cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while wait and not self.answers():
            assert self._process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self) -> None:
        """Stop it with all its processes, at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
            self._process = None
