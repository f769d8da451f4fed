"""A PostgreSQL of the tests' own: its data in a temporary folder, on a free port of 127.0.0.1, with a password."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from workbench.benchmarks.tracking_server import free_port

USER, PASSWORD = "bench", "kept-to-myself"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "log_min_messages": "fatal",
}


class Postgres:
    """A server that can be stopped and started again on the same port with the same data."""

    def __init__(self, programs: Path, folder: Path):
        self.programs, self.folder, self.port = programs, folder, free_port()
        self._process: subprocess.Popen | None = None
        self._count = 0
        secret = folder / "password"
        secret.write_text(PASSWORD)
        self._user: dict = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            for path in (folder, secret):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        options = ("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync", f"--username={USER}")
        made = subprocess.run(
            [programs / "initdb", *options, f"--pwfile={secret}", folder / "data"],
            cwd=folder, capture_output=True, text=True, **self._user,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        secret.unlink()

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        """For SQLAlchemy, and so for MLflow and Optuna."""
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def create(self) -> str:
        """URL of a new, empty database."""
        import psycopg

        self._count += 1
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE d{self._count}")
        return self.url(f"d{self._count}")

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers."""
        settings = {**SETTINGS, "unix_socket_directories": str(self.folder), "port": str(self.port)}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", self.folder / "data"]
                + [part for name, value in settings.items() for part in ("-c", f"{name}={value}")],
                cwd=self.folder, stdout=log, stderr=log, **self._user,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Stop it as an operator would: whoever is connected is thrown out."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(60)
            self._process = None


@contextmanager
def own_postgres() -> Iterator[Postgres]:
    """A running one, which leaves nothing behind. Skips the test where PostgreSQL is not installed."""
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed (psycopg)")
    found = shutil.which("initdb") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (no initdb on PATH or in /usr/lib/postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = None
    try:
        server = Postgres(Path(found).resolve().parent, folder)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One for all tests of a session; a test that stops it has to start it again."""
    with own_postgres() as server:
        yield server
