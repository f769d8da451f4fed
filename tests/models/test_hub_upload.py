"""Uploading to a hub on loopback, through huggingface_hub's own client; the model card; mistakes."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support.commands import invoke
from workbench.common.errors import Failure, UserError
from workbench.models import hub_upload
from workbench.models.hub_upload import card, files_of, upload

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client writes with; every file is a regular one."""

    protocol_version = "HTTP/1.1"
    made: dict  # repository -> {"private": ..., "files": {...}}
    refuse = 0

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refuse:
            return self.reply({"error": "no"}, self.refuse)
        if self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            if name in self.made:
                there = {"url": f"http://{self.headers['Host']}/{name}", "error": "You already created this model repo"}
                return self.reply(there, 409)
            self.made[name] = {"visibility": told.get("visibility"), "files": {}, "commits": 0}
            return self.reply({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.reply({"files": modes})
        for line in body.decode().splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                self.made[name]["files"][told["value"]["path"]] = base64.b64decode(told["value"]["content"])
        self.made[name]["commits"] += 1
        self.reply(
            {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/c0de", "commitOid": "c0de", "hookOutput": ""}
        )

    def do_GET(self):
        name = "/".join(self.path.split("/")[3:5])
        self.reply({"id": name, "sha": "c" * 40, "private": True, "tags": [], "siblings": []})

    def reply(self, found, code=200):
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    handler = type("Own", (Hub,), {"made": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for module in ("constants", "hf_api", "_commit_api"):
        monkeypatch.setattr(
            f"huggingface_hub.{module}.ENDPOINT", f"http://127.0.0.1:{server.server_port}", raising=False
        )
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def lora(workplace):
    (workplace / "trained" / ".cache").mkdir(parents=True)
    (workplace / "trained" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    (workplace / "trained" / "notes.doc").write_text("mine")
    (workplace / "trained" / ".cache" / "secret.txt").write_text("secret")
    return Path("trained")


def test_a_model_and_its_card_are_one_commit_to_a_private_repository(lora, hub):
    done = invoke("push", "trained", "me/mine", "--base", BASE)
    assert done.returncode == 0, done.stderr
    assert "Uploaded: http://127.0.0.1" in done.stdout and "/me/mine/commit/c0de" in done.stdout
    repository = hub.made["me/mine"]
    assert repository["visibility"] == "private" and repository["commits"] == 1
    assert set(repository["files"]) == {"README.md", "pytorch_lora_weights.safetensors"}
    assert repository["files"]["pytorch_lora_weights.safetensors"] == b"weights"
    assert f"base_model: {BASE}" in repository["files"]["README.md"].decode()


def test_a_repository_that_is_there_stays_unless_it_is_to_be_updated(lora, hub):
    upload(lora, "me/mine", "a card", public=True)
    assert hub.made["me/mine"]["visibility"] == "public"
    with pytest.raises(UserError, match="me/mine: is there already; --update adds a commit to it"):
        upload(lora, "me/mine", "another")
    assert hub.made["me/mine"]["files"]["README.md"] == b"a card"
    (lora / "README.md").write_text("their own")
    upload(lora, "me/mine", "another", update=True)
    assert hub.made["me/mine"]["files"]["README.md"] == b"their own" and hub.made["me/mine"]["commits"] == 2


def test_the_card_says_what_it_is_and_names_no_path(lora, workplace):
    text = card(lora, "me/mine", BASE, {"lora.rank": "4"})
    read = ModelCard(text)
    assert read.data.base_model == BASE and read.data.library_name == "diffusers" and "lora" in read.data.tags
    assert f'DiffusionPipeline.from_pretrained("{BASE}")' in text and 'load_lora_weights("me/mine")' in text
    assert "| `lora.rank` | `4` |" in text
    (workplace / "folder" / "model").mkdir(parents=True)
    (workplace / "folder" / "model" / "model_index.json").write_text("{}")
    whole = card(workplace / "folder" / "model", "me/mine", "folder/model", {})
    assert "folder/model" not in whole and 'from_pretrained("me/mine")' in whole and "Settings" not in whole


def test_a_dry_run_uploads_nothing(lora, hub):
    done = invoke("push", "trained", "me/mine", "--dry-run")
    assert done.returncode == 0 and "pytorch_lora_weights.safetensors" in done.stdout and "notes.doc" not in done.stdout
    assert not hub.made


def test_mistakes_are_one_clear_line(lora, hub, monkeypatch):
    with pytest.raises(UserError, match="a b: expected OWNER/NAME"):
        upload(lora, "a b", "")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty: no trained model"):
        files_of(Path("empty"))
    hub.refuse = 401
    with pytest.raises(Failure, match=r"me/mine: not uploaded .*; log in by `hf auth login`") as error:
        upload(lora, "me/mine", "")
    assert "\n" not in str(error.value) and hub_upload.CARD not in hub.made
