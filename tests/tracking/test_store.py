"""The connection to a tracking store: tables of other versions, servers and proxies."""

import hashlib
import http.server
import sqlite3
import threading

import pytest
from alembic.script import ScriptDirectory
from mlflow.store.db.utils import _get_alembic_config

from workbench import tracking
from workbench.common.errors import Failure
from workbench.tracking import store, ui


def with_version(database, version):
    connection = sqlite3.connect(database)
    connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    connection.commit()
    connection.close()


@pytest.mark.parametrize("newer", [False, True])
def test_tables_of_another_mlflow_are_left_as_they_are(newer, workplace, monkeypatch):
    older = [revision.revision for revision in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()][3]
    with_version(workplace / "mlflow.db", "f" * 12 if newer else older)
    connection = sqlite3.connect(workplace / "mlflow.db")
    connection.execute("DROP TABLE IF EXISTS trace_info")  # as in the older one; MLflow would change all at once
    connection.close()
    before = hashlib.sha256((workplace / "mlflow.db").read_bytes()).hexdigest()
    says = (
        "tables are of a newer MLflow than"
        if newer
        else rf"older MLflow.* first cp {workplace}/mlflow\.db {workplace}/mlflow\.db\.backup, then .*mlflow db upgrade"
    )
    with pytest.raises(Failure, match=says):
        tracking.connect()
    assert hashlib.sha256((workplace / "mlflow.db").read_bytes()).hexdigest() == before


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    found = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()


def test_a_server_on_this_machine_is_called_without_a_proxy(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    store._require_server(server)


def test_a_server_behind_a_proxy_that_is_away_names_the_variable(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(Failure, match=r"\(ProxyError\); start it \(.*http_proxy is set; .* add tracking\.test to NO_"):
        store._require_server("http://tracking.test:5000")


def test_printed_commands_can_be_pasted(workplace, monkeypatch):
    folder = workplace / "a folder; with?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert f"--backend-store-uri 'sqlite:///{workplace}/a folder%3B with%3F/mlflow.db' " in ui.ui_command()
