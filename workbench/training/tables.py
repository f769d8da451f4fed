"""The tables of a run's settings that are the same whatever functions it chooses; `config` puts them together."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from workbench.common.validation import EDGE, NotNegative, Positive
from workbench.training.sections import Place, Section, StartPlace

Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal[
    "warmup", "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


class Model(Section):
    """What is trained."""

    path: Place = Field("embedded", description="diffusers folder or hub id; 'embedded' is the small model")
    family: Literal["auto", "sd", "sdxl", "sd3", "flux1", "flux2-klein", "qwen-image", "z-image", "sana"] = Field(
        "auto", description="what `path` has to be; 'auto' = anything"
    )
    policy: StartPlace = Field(
        "", description="trained weights that the policy begins with, as `--output` wrote them; none = the model's own"
    )
    reference: StartPlace = Field(
        "", description="the same of the reference; divergence is measured from `path` anyway"
    )
    revision: str = Field("", description="branch, tag or commit of a hub id")
    variant: str = Field(
        "", description="which weight files of the checkpoint, e.g. 'fp16'; training is float32 anyway"
    )
    vae: Place = Field("", description="folder or hub id of another autoencoder to use in place of its own")
    resolution: int = Field(0, ge=0, le=EDGE, description="edge of the images in pixels; 0 = the model's own")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="precision of the forward passes")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', ...")
    compile: bool = Field(False, description="torch.compile the denoisers")


def _listed(value: Any) -> Any:
    """Accept one name in place of a list of names."""
    return (value,) if isinstance(value, str) else value


class Lora(Section):
    """Low-rank adapters in place of a full fine-tune; policy, reference and pretrained model share one denoiser."""

    rank: int = Field(0, ge=0, le=4096, description="of the adapters; 0 = full fine-tune")
    alpha: float = Field(0.0, ge=0, description="the adapters are scaled by alpha / rank; 0 = alpha is the rank")
    targets: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (), description="ends of layers' names; none = the family's attention layers"
    )

    @model_validator(mode="after")
    def _of_adapters(self) -> "Lora":
        if not self.rank and (self.alpha or self.targets):
            raise ValueError("alpha and targets belong to adapters; set lora.rank above 0")
        return self


class Columns(Section):
    """What the columns of pairs are called, in lists of pictures, parquet files and data sets on the hub.

    Pairs have either the columns chosen and rejected, or jpg_0, jpg_1, label_0 and label_1. What an image's column
    holds is a path in a list, and an encoded image elsewhere.
    """

    caption: str = Field("caption", description="column of the captions, in lists, parquet files and on the hub")
    chosen: str = Field("chosen", description="of the preferred images: in a list paths, seen from the list's folder")
    rejected: str = Field("rejected", description="of the other images")
    jpg_0: str = Field("jpg_0", description="of the first images, where labels say which is preferred")
    jpg_1: str = Field("jpg_1", description="of the second images")
    label_0: str = Field("label_0", description="1 where the first image is preferred, 0 where the second is")
    label_1: str = Field("label_1", description="the same of the second image")


class Data(Section):
    """What it is trained and judged on."""

    train: Place = Field(
        "embedded",
        description="parquet (file, folder, hub id[:split]), a .csv, .jsonl or .json list of pictures, or encoded; "
        "data.columns names the columns",
    )
    validation: Place = Field("embedded", description="the same, for diagnostics")
    prompts: Place = Field(
        "embedded",
        description="text file of prompts to draw, one a line; 'embedded' = the small model's test prompts, "
        "'validation' = its others",
    )
    columns: Columns = Columns()
    limit: NotNegative = Field(0, description="use at most so many training pairs; 0 = all")
    limit_seed: NotNegative = Field(
        0, description="0 = the first `limit` pairs; another number draws them at random, from local parquet files"
    )
    validation_limit: NotNegative = Field(0, description="the same of validation pairs")
    cache: bool = Field(True, description="encode the training pairs once; false = from the images, each time anew")
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="share of training pairs whose caption is left out, drawn anew each time"
    )
    sizes: Literal["original", "resolution"] = Field(
        "original",
        description="what SDXL is told of an image: its size and crop (diffusers' scripts), or the resolution (public "
        "Diffusion-DPO code)",
    )
    resize: Literal["bicubic", "bilinear", "lanczos"] = Field(
        "bicubic", description="filter by which images are resized before they are encoded; public code's is bilinear"
    )
    crop: Literal["center", "random"] = Field(
        "center",
        description="which square of a training image is kept; 'random' = one along its longer edge, drawn once for "
        "both images of a pair",
    )
    scores: Annotated[str, Field(pattern=r"^\w*$")] = Field(
        "",
        description="the training pairs' columns SCORES_0 and SCORES_1 hold the images' scores, for objective.label",
    )
    flip: bool | Literal["independent"] = Field(
        False,
        description="train on mirrored pairs too, both images of a pair alike; 'independent' = each image by itself, "
        "as public code flips them",
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="of the latents and embeddings on disk")


Way = Literal["previous", "pretrained"]


class Rounds(Section):
    """Rounds of draw, score, pair and train, by `python -m workbench.rounds`; other commands do not look at it."""

    count: Positive = Field(3, description="rounds; a larger number later adds some")
    policy: Way = Field(
        "previous", description="what each round's policy begins with: the previous round's, or the pretrained model"
    )
    reference: Way = Field("previous", description="the same of each round's reference")
    prompts: Place = Field("train", description="prompt set whose images make the pairs, as workbench.prefer takes it")
    limit: NotNegative = Field(0, description="only the first so many prompts; 0 = all")
    scorers: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        ("reward",), description="reward models that score the images, NAME or NAME=SOURCE, or functions of your own"
    )
    images: Positive = Field(4, description="images a prompt and round")
    settings: Literal["random", "all"] = Field("random", description="how steps and guidance go together")
    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field((12,), description="of the sampler")
    guidance: Annotated[tuple[float, ...], Field(min_length=1)] = Field((3.0,), description="of the sampler")
    pairs: Literal["fours", "best-worst", "halves", "all"] = Field(
        "best-worst", description="which images of a prompt make a pair"
    )
    label: Literal["bradley-terry", "score", "vote"] = Field("score", description="which of the two is preferred")
    gap: float = Field(0.0, ge=0, description="leave out pairs whose scores differ by less")
    tie: float = Field(0.0, ge=0, description="smaller differences are ties")
    slope: float = Field(2.0, ge=0, description="of 'bradley-terry', per unit of the score")
    batch_size: Positive = Field(64, description="images drawn at once")
    image_format: Literal["avif", "png"] = Field("avif", description="how images are stored; png loses nothing")


class Train(Section):
    """The optimizer and its budget."""

    steps: Positive = Field(128, description="optimizer steps")
    batch_size: Positive = Field(8, description="pairs a forward pass")
    accumulation: Positive = Field(1, description="forward passes an optimizer step")
    lr: float = Field(3e-6, gt=0, description="learning rate after warm-up, as the optimizer sees it unless scale_lr")
    scale_lr: bool = Field(False, description="multiply lr by the pairs of an optimizer step, as public code does")
    optimizer: Literal["adamw", "adamw_8bit", "adamw_paged", "adafactor", "prodigy"] = Field(
        "adamw", description="8 bit and paged need bitsandbytes; prodigy needs prodigyopt, and an lr near 1"
    )
    schedule: Schedule = Field(
        "warmup",
        description="of the learning rate: 'warmup' = constant after it, whose first step has lr / (warmup + 1); the "
        "others are diffusers' get_scheduler, whose warm-up begins with a step of rate 0",
    )
    warmup: NotNegative = Field(5, description="steps of linear warm-up")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="AdamW's")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's, added to the root of its second moment")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    noise_offset: float = Field(
        0.0, ge=0, description="noise that is alike over a channel is added to the noise, so many times"
    )
    input_perturbation: float = Field(
        0.0, ge=0, description="so many times other noise is added to the noise of x_t, not to the target"
    )
    checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="on several processes: a copy each, or sharded weights")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of an average of the policy's weights, which is evaluated and saved in its place; 0 = none",
    )
    keep: bool = Field(False, description="keep the trained weights as the run's artifact `model`")
    checkpoint_every: NotNegative = Field(
        0, description="steps between checkpoints, kept as artifacts `checkpoints/STEP` that diffusers loads; 0 = none"
    )
    checkpoints_kept: NotNegative = Field(0, description="newest checkpoints kept; 0 = all")
    max_hours: float = Field(
        0.0, ge=0, description="stop with a snapshot after so many hours, to be resumed; 0 = no limit"
    )


class Diagnostics(Section):
    """What is measured while it trains."""

    interval: Positive = Field(16, description="steps between passes over the validation pairs")
    buckets: int = Field(10, gt=0, le=1000, description="equal timestep intervals")
    pairs: Positive = Field(100, description="validation pairs in each pass, at one timestep each")
    draws: int = Field(
        3, gt=0, le=1000, description="timesteps a pair in the last pass, which sees all pairs, by bucket"
    )
    probe: Positive = Field(256, description="winners in the fixed probe for the divergence")
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="images at once, on each process")


class Evaluation(Section):
    """Samples drawn from the trained model and scored against the pretrained model's."""

    seeds: int = Field(1, ge=0, le=1000, description="images a test prompt; 0 = no evaluation")
    steps: Positive = Field(12, description="steps of the family's sampler, which is DDIM for sd and sdxl")
    guidance: float = Field(3.0, ge=0, description="scale of the pipeline's guidance; 1 = none, for Z-Image 0 = none")
    batch_size: Positive = Field(48, description="images at once")
    grid: NotNegative = Field(8, description="images in the sample grid of each diagnostics pass; 0 = none")


class SnapshotSection(Section):
    """What a run that is killed or stopped goes on from."""

    interval: NotNegative = Field(
        32, description="steps between snapshots of the whole training state; 0 = only when a run is stopped"
    )
    keep: Annotated[int, Field(ge=2)] = Field(2, description="newest snapshots kept: one may turn out damaged")
