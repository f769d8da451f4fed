"""Each scorer's arithmetic on tiny random checkpoints, against a computation written here."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.support.reward_models import (
    EDGE,
    LINES,
    MED,
    PATCH,
    SIZES,
    WIDE,
    head_state,
    imagereward_state,
    open_clip_state,
    save_clip,
)
from workbench.common.errors import Failure, UserError
from workbench.evaluation import plan, reward_models, scorers
from workbench.models.small.prompts import split

CPU = torch.device("cpu")
PROMPTS = [str(p) for p in split()["test"][:5]] + [str(split()["test"][0])]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pixels(images):
    """Resized and normalised by transformers' own CLIP processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE})
    return processor([Image.fromarray(i) for i in images], return_tensors="pt").pixel_values


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP with its tokenizer, saved."""
    return save_clip(tmp_path_factory.mktemp("clip"))


def cosine(clip, pixels, prompts):
    """One pair at a time, without padding."""
    _, model, tokenizer = clip
    with torch.no_grad():
        out = [
            model(input_ids=tokenizer(p, return_tensors="pt").input_ids, pixel_values=x[None])
            for p, x in zip(prompts, pixels, strict=True)
        ]
    return np.array([F.cosine_similarity(o.text_embeds, o.image_embeds).item() for o in out])


def score(name, source, images, prompts=PROMPTS, batch_size=4):
    return scorers.locate(name, str(source)).load(CPU, batch_size)(images, prompts)


@pytest.mark.parametrize(
    ("name", "factor"), [("pickscore", math.exp(3.3)), ("clip", 100), ("clip-h", 100), ("hpsv2", 100)]
)
def test_clip_scorers_are_a_factor_times_the_cosine(clip, images, pixels, name, factor):
    found = score(name, clip[0], images)
    assert found.dtype == np.float64 and found.shape == (6,)
    np.testing.assert_allclose(found, factor * cosine(clip, pixels, PROMPTS), atol=1e-3)
    assert len(np.unique(found.round(3))) == 6


def test_scores_depend_neither_on_the_batch_nor_on_how_images_are_given(clip, images):
    whole = score("pickscore", clip[0], images, batch_size=6)
    for batch_size in (1, 4):
        np.testing.assert_allclose(score("pickscore", clip[0], images, batch_size=batch_size), whole, atol=1e-4)
    np.testing.assert_allclose(score("pickscore", clip[0], [Image.fromarray(i) for i in images]), whole, atol=1e-4)
    assert score("pickscore", clip[0], images[:0], []).shape == (0,)


def test_a_long_prompt_is_cut_as_the_tokenizer_cuts_it(clip, images, pixels):
    _, _, tokenizer = clip
    long = " ".join(PROMPTS)
    ids = tokenizer(long, truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == tokenizer.model_max_length < len(tokenizer(long).input_ids)
    with torch.no_grad():
        out = clip[1](input_ids=ids, pixel_values=pixels[:1])
    expected = F.cosine_similarity(out.text_embeds, out.image_embeds).item()
    assert score("clip", clip[0], images[:1], [long])[0] == pytest.approx(100 * expected, abs=1e-3)


def test_an_image_that_is_not_square_is_resized_by_its_shorter_edge_and_cropped():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}, do_normalize=False, do_rescale=False
    )
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(reward_models.square(picture, EDGE), expected)
    assert reward_models.square(picture.convert("L"), EDGE).shape == (EDGE, EDGE, 3)


# --- HPSv2's official file: open_clip's names ------------------------------------------------------------------

HEADS = 16  # of ViT-H-14's towers


def open_clip_tower(state, prefix, x, mask=None):
    """Pre-norm transformer blocks as open_clip's model.py has them, through torch's own multi-head attention."""
    for layer in range(2):
        p = f"{prefix}transformer.resblocks.{layer}"
        y = F.layer_norm(x, (WIDE,), state[f"{p}.ln_1.weight"], state[f"{p}.ln_1.bias"])
        attention = torch.nn.MultiheadAttention(WIDE, HEADS, batch_first=True)
        attention.load_state_dict({k.split(".attn.")[1]: v for k, v in state.items() if k.startswith(f"{p}.attn.")})
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, (WIDE,), state[f"{p}.ln_2.weight"], state[f"{p}.ln_2.bias"])
        y = F.gelu(F.linear(y, state[f"{p}.mlp.c_fc.weight"], state[f"{p}.mlp.c_fc.bias"]))
        x = x + F.linear(y, state[f"{p}.mlp.c_proj.weight"], state[f"{p}.mlp.c_proj.bias"])
    return x


@torch.no_grad()
def open_clip_cosine(state, tokenizer, pixels, prompts):
    tokens = torch.zeros(len(prompts), 16, dtype=torch.long)  # open_clip pads with 0
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = tokenizer(prompt).input_ids
        row[: len(ids)] = torch.tensor(ids)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = open_clip_tower(state, "", x, torch.full((16, 16), -math.inf).triu(1))
    x = F.layer_norm(x, (WIDE,), state["ln_final.weight"], state["ln_final.bias"])
    end = (tokens == tokenizer.eos_token_id).int().argmax(1)  # open_clip takes the highest id, which is this one there
    text = x[torch.arange(len(x)), end] @ state["text_projection"]
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, WIDE), x], 1)
        + state["visual.positional_embedding"]
    )
    x = F.layer_norm(x, (WIDE,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = open_clip_tower(state, "visual.", x)[:, 0]
    image = (
        F.layer_norm(x, (WIDE,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    )
    return F.cosine_similarity(text, image).numpy()


def test_hpsv2_reads_its_official_file(clip, images, pixels, tmp_path):
    _, _, tokenizer = clip
    state = open_clip_state(len(tokenizer))
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    torch.save({}, tmp_path / "HPS_v2.1_compressed.pt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected = 100 * open_clip_cosine(state, tokenizer, pixels, PROMPTS)
    np.testing.assert_allclose(score("hpsv2", tmp_path, images), expected, atol=1e-3)


# --- LAION-Aesthetics ------------------------------------------------------------------------------------------


def affine(state, x, prefix=""):
    for i in SIZES:
        x = x @ state[f"{prefix}layers.{i}.weight"].T + state[f"{prefix}layers.{i}.bias"]
    return x[:, 0]


@pytest.mark.parametrize("file", ["head.pth", "head.safetensors"])
def test_aesthetic_is_the_linear_head_on_the_unit_embedding(clip, images, pixels, tmp_path, file):
    from safetensors.torch import save_file

    state = head_state()
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    (tmp_path / "clip").symlink_to(clip[0])
    with torch.no_grad():
        embedding = clip[1].visual_projection(clip[1].vision_model(pixels).pooler_output)
    expected = affine(state, embedding / embedding.norm(dim=-1, keepdim=True)).numpy()
    np.testing.assert_allclose(score("aesthetic", tmp_path, images), expected, atol=1e-4)
    np.testing.assert_allclose(score("aesthetic", tmp_path, images, PROMPTS[::-1]), expected, atol=1e-4)


# --- ImageReward -----------------------------------------------------------------------------------------------


@torch.no_grad()
def imagereward_score(state, pixels, ids, mask):
    """The `image-reward` package's arithmetic for one pair, written out."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(query, key, value, heads, bias=0.0):
        q, k, w = (x.view(len(x), heads, -1).transpose(0, 1) for x in (query, key, value))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        return (weights @ w).transpose(0, 1).flatten(1)

    patches = F.conv2d(pixels[None], state[f"{v}patch_embed.proj.weight"], state[f"{v}patch_embed.proj.bias"], PATCH)
    x = torch.cat([state[f"{v}cls_token"][0], patches[0].flatten(1).T]) + state[f"{v}pos_embed"][0]
    for i in range(2):
        b = f"{v}blocks.{i}."
        x = x + linear(f"{b}attn.proj", attend(*linear(f"{b}attn.qkv", norm(f"{b}norm1", x, 1e-6)).chunk(3, -1), 16))
        x = x + linear(f"{b}mlp.fc2", F.gelu(linear(f"{b}mlp.fc1", norm(f"{b}norm2", x, 1e-6))))
    seen = norm(f"{v}norm", x, 1e-6)
    e = f"{t}embeddings."
    x = state[f"{e}word_embeddings.weight"][ids] + state[f"{e}position_embeddings.weight"][: len(ids)]
    x = norm(f"{e}LayerNorm", x, 1e-12)
    hidden = (1 - mask.float()) * -10000
    for i in range(2):
        b = f"{t}encoder.layer.{i}."
        for kind, source, bias in (("attention", None, hidden), ("crossattention", seen, 0.0)):
            s = f"{b}{kind}.self."
            other = x if source is None else source
            y = attend(linear(f"{s}query", x), linear(f"{s}key", other), linear(f"{s}value", other), 3, bias)
            x = norm(f"{b}{kind}.output.LayerNorm", linear(f"{b}{kind}.output.dense", y) + x, 1e-12)
        y = linear(f"{b}output.dense", F.gelu(linear(f"{b}intermediate.dense", x)))
        x = norm(f"{b}output.LayerNorm", y + x, 1e-12)
    return ((affine(state, x[:1], "mlp.") - 0.16717362830052426) / 1.0333394966054072).item()


@pytest.fixture
def imagereward(tmp_path):
    """A folder as the published one, with a word-piece vocabulary of the prompts' words, and its state."""
    words = sorted({word for p in PROMPTS for word in p.replace(",", " ,").split()})
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    assert len(lines) <= LINES
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    state = imagereward_state()
    torch.save(state, tmp_path / "ImageReward.pt")
    return tmp_path, state, lines


def test_imagereward_is_the_packages_arithmetic(imagereward, images, pixels):
    folder, state, lines = imagereward
    expected = []
    for prompt, x in zip(PROMPTS, pixels, strict=True):
        ids = [2] + [lines.index(word) for word in prompt.replace(",", " ,").split()] + [3]
        mask = torch.tensor([1] * len(ids) + [0] * (35 - len(ids)))
        expected.append(imagereward_score(state, x, torch.tensor(ids + [0] * (35 - len(ids))), mask))
    found = score("imagereward", folder, images)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(found) > 0.01


# --- the small model's reward, and what can go wrong -----------------------------------------------------------


def test_reward_is_the_small_models_and_refuses_other_prompts():
    from workbench.models import ASSETS
    from workbench.models.small.reward import Reward

    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(score("reward", "", images), Reward(ASSETS)(images, PROMPTS), atol=1e-5)
    reward_models.REWARD_MODELS["reward"].check(PROMPTS)
    with pytest.raises(UserError, match=r"--scorer reward: judges only .*'a corgi'"):
        reward_models.REWARD_MODELS["reward"].check([*PROMPTS, "a corgi"])


def test_the_digest_follows_the_weights(clip, tmp_path):
    import shutil

    shutil.copytree(clip[0], tmp_path / "copy")
    assert scorers.locate("clip", str(tmp_path / "copy")).digest == scorers.locate("clip", str(clip[0])).digest
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert scorers.locate("clip", str(tmp_path / "copy")).digest != scorers.locate("clip", str(clip[0])).digest


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickles_are_not_run(clip, tmp_path, capsys):
    torch.save({"layers.0.weight": Evil()}, tmp_path / "head.pth")
    (tmp_path / "clip").symlink_to(clip[0])
    with pytest.raises(UserError, match=r"head\.pth: holds more than tensors"):
        score("aesthetic", tmp_path, [])
    assert "code ran" not in capsys.readouterr().out


def test_mistakes_name_the_option_and_what_is_missing(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, source, kind, message in (
        ("pickscor", "", UserError, "--scorer 'pickscor': expected one of pickscore, hpsv2"),
        ("clip", "no/such/folder", UserError, "--scorer clip=no/such/folder: no such folder, and not a hub id"),
        ("clip", str(empty), UserError, "neither the folder nor model/ in it has config.json and *.safetensors"),
        ("pickscore", "", Failure, "hub could not be reached for yuvalkirstain/PickScore_v1; name a local folder"),
        ("clip", "someone/clip", Failure, "hub could not be reached for someone/clip"),
    ):
        with pytest.raises(kind) as caught:
            scorers.locate(name, source)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_not_a_scorers_are_refused(clip, imagereward, tmp_path):
    folder, state, _ = imagereward
    torch.save({k: v for k, v in state.items() if "blocks.1.norm1" not in k}, folder / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward\.pt: not the expected weights"):
        score("imagereward", folder, [])
    torch.save({"a": torch.zeros(1)}, folder / "ImageReward.pt")
    with pytest.raises(UserError, match=r"not ImageReward's weights"):
        score("imagereward", folder, [])
    head = tmp_path / "head"
    head.mkdir()
    (head / "clip").symlink_to(clip[0])
    torch.save({f"layers.{i}.weight": torch.zeros(1, 1) for i in (0, 3, 6)}, head / "relu.pth")
    with pytest.raises(UserError, match=r"relu\.pth: layers \[0, 3, 6\]"):
        score("aesthetic", head, [])
    torch.save(head_state(into=7), head / "relu.pth")
    with pytest.raises(UserError, match=r"takes 7 numbers, the CLIP in .* makes 24"):
        score("aesthetic", head, [])
    (head / "relu.pth").write_bytes(b"not a torch file")
    with pytest.raises(UserError, match=r"relu\.pth: "):
        score("aesthetic", head, [])


def test_both_clip_scores_have_names_and_the_papers_is_taken_with_its_table():
    headings = {name: reward_models.REWARD_MODELS[name].heading for name in ("clip", "clip-h")}
    assert headings == {"clip": "CLIP ViT-L/14", "clip-h": "CLIP ViT-H/14"}
    parts = {name: reward_models.REWARD_MODELS[name].parts["model"].hub for name in headings}
    assert parts["clip"].startswith("openai/clip-vit-large") and parts["clip-h"].startswith(
        "laion/CLIP-ViT-H-14-laion2B"
    )
    chosen = [plan._scorers({}, set(), SimpleNamespace(scorers=(), paper=paper)) for paper in ("sd15", None)]
    assert [*chosen[0]] == ["pickscore", "hpsv2", "clip-h", "aesthetic", "imagereward"] and [*chosen[1]] == ["reward"]
    named = SimpleNamespace(scorers=("clip",), paper="sd15")
    assert [*plan._scorers({}, set(), named)] == ["clip"]
