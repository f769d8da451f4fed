"""Uploading to a hub on loopback, through huggingface_hub's own client; the model card; mistakes."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.support.commands import invoke
from workbench import tracking
from workbench.common.errors import Failure, UserError
from workbench.models import load
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
    assert f'DiffusionPipeline.from_pretrained("{BASE}", variant="fp16")' in card(
        lora, "me/mine", BASE, {"model.variant": "fp16"}
    )


def loaded(text, **repositories):
    """What a card's own lines of Python load, with folders in the place of repositories."""
    code = text.partition("```python\n")[2].partition("```")[0]
    for name, folder in repositories.items():
        code = code.replace(f'"{name}"', repr(str(folder)))
    found: dict = {}
    exec(code, found)
    return found["pipe"]


def uploaded(hub, folder):
    """A folder with the files that the hub has of me/mine."""
    for name, content in hub.made["me/mine"]["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def shifted(tiny_model):
    """A checkpoint and its denoiser with other weights, as a full fine-tune changes them."""
    backend = load(str(tiny_model), torch.device("cpu"))
    denoiser = backend.denoiser()
    with torch.no_grad():
        denoiser.conv_in.bias += 0.5
    return backend, denoiser


def test_a_whole_model_is_its_parts_and_is_loaded_as_its_card_says(shifted, workplace, hub):
    backend, denoiser = shifted
    backend.save(denoiser, Path("out/trained"))
    for stray in ("run.json", "samples/notes.txt", "unet/optimizer.pt"):
        Path("out/trained", stray).parent.mkdir(exist_ok=True)
        Path("out/trained", stray).write_text("mine")
    Path("out/trained/tokenizer/chat_template.jinja").write_text("{{ messages }}")
    text = card(Path("out/trained"), "me/mine", "out/trained", {})
    assert "out/trained" not in text and "Settings" not in text
    upload(Path("out/trained"), "me/mine", text)
    files = {*hub.made["me/mine"]["files"]}
    assert {"README.md", "model_index.json", "tokenizer/chat_template.jinja", "unet/config.json"} <= files
    assert not files & {"run.json", "samples/notes.txt", "unet/optimizer.pt"}
    pipe = loaded(text, **{"me/mine": uploaded(hub, workplace / "got")})
    assert torch.equal(pipe.unet.conv_in.bias, denoiser.conv_in.bias)


def test_a_run_that_kept_a_denoiser_alone_is_loaded_into_its_base(shifted, workplace, hub):
    backend, denoiser = shifted
    backend.save(denoiser, Path("kept"), whole=False)
    settings = {
        "model.path": BASE,
        "model.policy": "/home/somebody/policy",
        "data.train": "/home/somebody/pairs:train",
        "data.validation": "yuvalkirstain/pickapic_v2:validation",
        "data.prompts": "lists/somebody",
        "model.vae": "somebody/" + "x" * 250,
        "lora.rank": "0",
        "train.lr": "1e-05",
    }
    tracker = tracking.Tracker(tracking.connect(), "r", params=settings, tags={})
    tracker.artifact(Path("kept"), "model")
    tracker.close("complete")
    done = invoke("push", f"runs:/{tracker.run_id}", "me/mine")
    assert done.returncode == 0, done.stderr
    text = hub.made["me/mine"]["files"]["README.md"].decode()
    assert "somebody" not in text and "yuvalkirstain/pickapic_v2:validation" in text
    # That another autoencoder was used is said, though its place is not.
    assert "another autoencoder than that model's own: a folder that is not on the hub." in text
    assert "| `train.lr` | `1e-05` |" in text and ModelCard(text).data.base_model == BASE
    pipe = loaded(text, **{"me/mine": uploaded(hub, workplace / "got"), BASE: backend.folder})
    assert torch.equal(pipe.unet.conv_in.bias, denoiser.conv_in.bias)


def test_the_card_names_another_autoencoder_and_loads_it(shifted, lora, workplace):
    backend, denoiser = shifted
    backend.save(denoiser, Path("kept"), whole=False)
    vae = "madebyollin/sdxl-vae-fp16-fix"
    text = card(Path("kept"), "me/mine", BASE, {"model.vae": vae})
    assert f"another autoencoder than that model's own: `{vae}`." in text
    pipe = loaded(text, **{"me/mine": Path("kept"), BASE: backend.folder, vae: backend.folder / "vae"})
    assert torch.equal(pipe.unet.conv_in.bias, denoiser.conv_in.bias)
    text = card(lora, "me/mine", BASE, {"model.vae": vae})
    assert f'AutoModel.from_pretrained("{vae}")' in text and f'from_pretrained("{BASE}", vae=vae)' in text
    assert "autoencoder" not in card(lora, "me/mine", BASE, {})


def test_a_base_of_almost_a_known_name_is_pointed_out(lora):
    for given, code in (("stable-difusion-v1-5/stable-difusion-v1-5", 0), ("stable-diffusion-v1-5", 2)):
        done = invoke("push", "trained", "me/mine", "--base", given, "--dry-run")
        assert done.returncode == code and f"; did you mean {BASE}?" in done.stderr
    others = ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-xl-base-0.9", "Qwen/Qwen-Image-Edit")
    for given in (BASE, "me/something-else", *others):
        assert not invoke("push", "trained", "me/mine", "--base", given, "--dry-run").stderr


def test_a_variant_is_read_off_the_weights(workplace):
    for name in ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "config.json"):
        Path("alone/unet").mkdir(parents=True, exist_ok=True)
        Path("alone/unet", name).write_text('{"_class_name": "UNet2DConditionModel"}')
    text = card(Path("alone"), "me/mine", "", {})
    assert text.count('variant="fp16"') == 2 and "`BASE` below stands for that model" in text
    Path("alone/unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors").rename(
        "alone/unet/diffusion_pytorch_model.safetensors"
    )
    assert "variant" not in card(Path("alone"), "me/mine", "", {})


def test_a_dry_run_shows_what_would_be_uploaded_and_uploads_nothing(lora, hub):
    done = invoke("push", "trained", "me/mine", "--dry-run")
    assert done.returncode == 0 and "pytorch_lora_weights.safetensors" in done.stdout and "notes.doc" not in done.stdout
    (lora / "README.md").write_text("their own")
    assert "their own" in invoke("push", "trained", "me/mine", "--dry-run").stdout
    assert not hub.made


def test_mistakes_are_one_clear_line(lora, hub, monkeypatch):
    with pytest.raises(UserError, match="OWNER/NAME 'a b': expected the name"):
        upload(lora, "a b", "")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty: no trained model"):
        files_of(Path("empty"))
    hub.refuse = 401
    with pytest.raises(Failure, match=r"me/mine: not uploaded .*; log in by `hf auth login`") as error:
        upload(lora, "me/mine", "")
    assert "\n" not in str(error.value) and not hub.made
    hub.refuse = 0
    for wrong in (["trained", "mine", "--dry-run"], ["trained", "me/mine", "--base", "a base"]):
        done = invoke("push", *wrong)
        assert done.returncode and "expected the name of a repository on the hub" in done.stderr
    assert not hub.made
