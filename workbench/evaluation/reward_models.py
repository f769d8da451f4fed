"""The field's reward models behind one small interface: images and prompts in, scores out.

| name | model | score |
| --- | --- | --- |
| pickscore | CLIP ViT-H fine-tuned on Pick-a-Pic (PickScore's README) | exp(logit scale) x cosine, about 20 |
| hpsv2 | CLIP ViT-H fine-tuned on HPDv2 (`hpsv2` package, v2.0) | 100 x cosine, about 27 |
| clip | CLIP ViT-L/14 (OpenAI) | 100 x cosine, about 30 |
| aesthetic | linear head on CLIP ViT-L/14's image embedding (`improved-aesthetic-predictor`) | 1 to 10, prompt unread |
| imagereward | BLIP and a linear head (`image-reward` package) | standardised, about -2 to 2 |
| reward | the small model's ground truth (`models.small.reward`) | nats, at most 0 |

All run in float32. Images are resized as OpenAI's CLIP does it (Pillow, bicubic, shorter edge, centre crop). HPSv2's
own code resizes tensors instead, without anti-aliasing in older torchvision, and scores in half precision on a GPU.
To add one: a function that loads it and an entry in REWARD_MODELS. `scorers` finds their files, and functions of the
user's own beside them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from workbench.common.errors import UserError
from workbench.evaluation.weights import blip_from_imagereward, clip_from_open_clip, linear_head, read_state
from workbench.models.safe_loading import check_weights, explained, load_network, require_finite
from workbench.models.small.prompts import parse
from workbench.models.small.reward import Images, Reward

#: A reward model's files by part, in the order in which the part names them.
Files = Mapping[str, Sequence[Path]]

# CLIP's, which BLIP and all models here share
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Mean and standard deviation of ImageReward's raw output on its authors' data (`image-reward` package)
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
# Length to which the `image-reward` package pads and cuts a prompt
REWARD_TOKENS = 35


class Scorer(Protocol):
    """A reward model, loaded: scores images for their prompts."""

    def __call__(self, images: Images, prompts: Sequence[str], /) -> NDArray[np.float64]:
        """One score an image, (N,)."""


# --- images ---------------------------------------------------------------------------------------------------


def square(image: Image.Image | NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """RGB, shorter edge resized to `size` by bicubic interpolation, the centre cropped: (size, size, 3)."""
    picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    if picture.size != (size, size):
        shorter = min(picture.size)
        # Rounded down, as CLIP's own preprocessing does; another size would move the crop by a pixel.
        width, height = (int(size * edge / shorter) for edge in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture)


class Batched:
    """A scorer that works in batches, so that its memory does not grow with the number of images.

    Args:
        module: the network, moved to the device and frozen.
        size: edge of the images that it takes, in pixels.
        score: pixels (B, 3, size, size), normalised, and prompts -> scores, (B,).
    """

    def __init__(
        self,
        module: nn.Module,
        size: int,
        score: Callable[[Tensor, Sequence[str]], Tensor],
        device: torch.device,
        batch_size: int,
    ):
        module.to(device).eval().requires_grad_(False)
        self.size, self.score, self.device, self.batch_size = size, score, device, batch_size
        self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        """One score an image, (N,)."""
        scores = []
        for start in range(0, len(prompts), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            pixels = torch.from_numpy(np.stack([square(image, self.size) for image in images[chunk]]))
            batch = pixels.to(self.device).permute(0, 3, 1, 2).float() / 255
            scores.append(self.score((batch - self.mean) / self.std, prompts[chunk]).double().cpu())
        return torch.cat(scores).numpy() if scores else np.empty(0)


# --- the models -----------------------------------------------------------------------------------------------


def _clip(files: Sequence[Path]) -> Any:
    from transformers import CLIPModel

    return load_network(CLIPModel, files[0].parent, f"{files[0].parent}: the CLIP model", torch_dtype=torch.float32)


def _clip_tokenizer(files: Sequence[Path]) -> Any:
    from transformers import CLIPTokenizer

    with explained(f"{files[0].parent}: the tokenizer"):
        return CLIPTokenizer.from_pretrained(files[0].parent, local_files_only=True)


def embed_images(model: Any, pixels: Tensor) -> Tensor:
    """CLIP's image embeddings of unit length, (B, D)."""
    return normalize(model.get_image_features(pixels).pooler_output, dim=-1)


def _cosine_scorer(model: Any, tokenizer: Any, factor: float, device: torch.device, batch_size: int) -> Scorer:
    length = model.config.text_config.max_position_embeddings

    def score(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))  # images of one prompt come together
        tokens = tokenizer(distinct, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        text = model.get_text_features(tokens.input_ids.to(device)).pooler_output
        place = [distinct.index(prompt) for prompt in prompts]
        return factor * (embed_images(model, pixels) * normalize(text, dim=-1)[place]).sum(-1)

    return Batched(model, model.config.vision_config.image_size, score, device, batch_size)


def _pickscore(files: Files, device: torch.device, batch_size: int) -> Scorer:
    model = _clip(files["model"])
    factor = model.logit_scale.exp().item()
    return _cosine_scorer(model, _clip_tokenizer(files["tokenizer"]), factor, device, batch_size)


def _clip_score(files: Files, device: torch.device, batch_size: int) -> Scorer:
    return _cosine_scorer(_clip(files["model"]), _clip_tokenizer(files["tokenizer"]), 100.0, device, batch_size)


def _hpsv2(files: Files, device: torch.device, batch_size: int) -> Scorer:
    tokenizer = _clip_tokenizer(files["tokenizer"])
    official = files["model"][0].suffix == ".pt"
    with explained(str(files["model"][0])):
        model = (
            clip_from_open_clip(_only(files["model"]), tokenizer.eos_token_id) if official else _clip(files["model"])
        )
    return _cosine_scorer(model, tokenizer, 100.0, device, batch_size)


def _aesthetic(files: Files, device: torch.device, batch_size: int) -> Scorer:
    weights = _only(files["head"])
    with explained(str(weights)):
        clip, head = _clip(files["clip"]), linear_head(read_state(weights), "", weights)
    made, taken = clip.config.projection_dim, head[0].in_features
    if made != taken:
        raise UserError(f"{weights}: takes {taken} numbers, the CLIP in {files['clip'][0].parent} makes {made}")

    def score(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return head(embed_images(clip, pixels))[:, 0]

    # One module, so that Batched moves and freezes both.
    both = nn.ModuleList([clip, head])
    return Batched(both, clip.config.vision_config.image_size, score, device, batch_size)


def _imagereward(files: Files, device: torch.device, batch_size: int) -> Scorer:
    from transformers import BertTokenizer

    words = files["tokenizer"][0].parent
    with explained(f"{words}: the tokenizer"):
        tokenizer = BertTokenizer.from_pretrained(words, local_files_only=True)
    config, *weights = files["model"]
    with explained(str(weights[0])):
        vision, text, head = blip_from_imagereward(_only(weights), config)

    def score(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=REWARD_TOKENS, return_tensors="pt"
        ).to(device)
        seen = vision(pixels).last_hidden_state
        read = text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        # The head reads the text encoder's first token, as the package does.
        return (head(read.last_hidden_state[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD

    return Batched(nn.ModuleList([vision, text, head]), vision.config.image_size, score, device, batch_size)


def _small_reward(files: Files, device: torch.device, batch_size: int) -> Scorer:
    folder = files["scorer"][0].parent.parent
    # ImageModel loads without the checks that `load_network` makes.
    for part in ("scorer", "critic"):
        check_weights(folder / part, str(folder / part))
    with explained(str(folder)):
        reward = Reward(folder, device)
    require_finite(reward.scorer.model, f"{folder}: scorer")
    require_finite(reward.critic.model, f"{folder}: critic")
    return reward


def _only(paths: Sequence[Path]) -> Path:
    if len(paths) != 1:
        raise UserError(f"{paths[0].parent}: which weights? Keep one of {', '.join(path.name for path in paths)}")
    return paths[0]


def _any_prompt(prompts: Sequence[str]) -> None:
    pass


def _small_prompt(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError as error:
            raise UserError(f"--scorer reward: judges only what the small model draws ({error})") from None


# --- where they come from -------------------------------------------------------------------------------------


class Part(NamedTuple):
    """The files of one part of a reward model.

    Attributes:
        hub: repository that has them.
        fetched: patterns of what is fetched from there.
        accepted: alternatives; a folder will do when it has a file for each pattern of one of them.
    """

    hub: str
    fetched: tuple[str, ...]
    accepted: tuple[tuple[str, ...], ...]

    def used(self, folder: Path) -> list[Path]:
        """The folder's files that the first alternative it satisfies names; none where it satisfies none."""
        for patterns in self.accepted:
            matches = [sorted(path for path in folder.glob(pattern) if path.is_file()) for pattern in patterns]
            if all(matches):
                return [path for paths in matches for path in paths]
        return []


MODEL = ("config.json", "*.safetensors")
VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = Part("openai/clip-vit-large-patch14", MODEL, (MODEL,))


def _tokenizer(hub: str) -> Part:
    return Part(hub, VOCABULARY, (("vocab.json", "merges.txt"), ("tokenizer.json",)))


@dataclass(frozen=True)
class RewardModel:
    """What is known of a reward model before it is loaded.

    Attributes:
        heading: its name in the paper's tables.
        parts: its files; a folder that the user names must hold the first.
        load: makes the scorer from its files by part, a device and a batch size.
        check: raises UserError for prompts that it cannot judge.
    """

    heading: str
    parts: Mapping[str, Part]
    load: Callable[[Files, torch.device, int], Scorer]
    check: Callable[[Sequence[str]], None] = field(default=_any_prompt)


_TRANSFORMERS = ("config.json", "model.safetensors")  # the repository has the same weights for open_clip too
_HPS = ("HPS_v2_compressed.pt",)
_BERT = Part("google-bert/bert-base-uncased", ("vocab.txt", "tokenizer*.json"), (("vocab.txt",), ("tokenizer.json",)))
_HEAD_FILES = (("*.pth",), ("*.pt",), ("*.safetensors",))
_REWARD_FILES = (("med_config.json", "*.pt"), ("med_config.json", "*.safetensors"))

#: The five of the paper's tables. It does not say which model its CLIP score is of; by its size probably OpenCLIP's
#: ViT-H/14, which PickScore and HPSv2 begin from, and not OpenAI's ViT-L/14.
PAPER_SCORERS = ("pickscore", "hpsv2", "clip-h", "aesthetic", "imagereward")

REWARD_MODELS: dict[str, RewardModel] = {
    "pickscore": RewardModel(
        "PickScore",
        {"model": Part("yuvalkirstain/PickScore_v1", MODEL, (MODEL,)), "tokenizer": _tokenizer(CLIP_H)},
        _pickscore,
    ),
    "hpsv2": RewardModel(
        "HPSv2",
        {
            # By its name before any .pt: a folder may hold v2.1 beside v2.0, whose scores are others.
            "model": Part(
                "xswu/HPSv2", (*MODEL, "HPS_v2_compressed.pt"), (MODEL, ("HPS_v2_compressed.pt",), ("*.pt",))
            ),
            "tokenizer": _tokenizer(CLIP_H),
        },
        _hpsv2,
    ),
    "clip": RewardModel("CLIP ViT-L/14", {"model": CLIP_L, "tokenizer": _tokenizer(CLIP_L.hub)}, _clip_score),
    "clip-h": RewardModel(
        "CLIP ViT-H/14",
        {"model": Part(CLIP_H, _TRANSFORMERS, (_TRANSFORMERS, MODEL)), "tokenizer": _tokenizer(CLIP_H)},
        _clip_score,
    ),
    "aesthetic": RewardModel(
        "Aesthetic",
        {"head": Part("trl-lib/ddpo-aesthetic-predictor", ("*.safetensors", "*.pth"), _HEAD_FILES), "clip": CLIP_L},
        _aesthetic,
    ),
    "imagereward": RewardModel(
        "ImageReward",
        {
            "model": Part("THUDM/ImageReward", ("ImageReward.pt", "med_config.json"), _REWARD_FILES),
            "tokenizer": _BERT,
        },
        _imagereward,
    ),
    "reward": RewardModel(
        "true reward",
        {name: Part("", (), (("config.json", "model.safetensors"),)) for name in ("scorer", "critic")},
        _small_reward,
        _small_prompt,
    ),
}
