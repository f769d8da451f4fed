"""What a run on many GPUs will take, by formulas: arithmetic, communication, memory, encoding, loading, storage, rows.

Pure functions of numbers. Units are FLOPs, bytes, seconds and pairs, without prefixes, and rates are those a second; a
GPU's bandwidths count one direction. Nothing is measured here; what is assumed is a field, or a constant with its
source.
"""

from dataclasses import dataclass, replace

from workbench.benchmarks.costs import Cost, state_bytes

#: Bytes of a float32 number: weights that are trained, and their gradients, in every precision of the forward pass.
FLOAT32 = 4
#: Times that fsdp gathers the weights in each pass: policy forward, policy backward, reference forward.
GATHERS = 3
#: Numbers that clipping and AdamW read and write for each trained weight (docs/performance.md).
OPTIMIZER_MOVES = 10
#: Pairs of Pick-a-Pic v2's training split without ties, and their distinct captions (Wallace et al. 2024, section 5.1).
PICK_A_PIC = (851_293, 58_960)
#: Seconds of a CPU core to decode one JPEG image of 768 x 768 and resize it: fixed, and for each pixel of the result.
#: Measured with Pillow 12 on one core of a Xeon: 8.4 ms at 512 x 512, 20.2 ms at 1024 x 1024.
DECODE = (4.5e-3, 15e-9)
#: Rows that a tracking store takes: `log_batch` into sqlite, 35 metrics a step in 14 ms.
STORE_ROWS = 2500.0


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, by its maker's data sheet (SXM board, dense rates).

    Attributes:
        rates: FLOP/s of matrix products by precision; "tf32" is what convolutions of float32 use by torch's default.
        memory: bytes.
        traffic: to and from that memory, bytes a second.
        link: to the other GPUs of its machine, one direction, bytes a second.
    """

    rates: dict[str, float]
    memory: float
    traffic: float
    link: float


GPUS = {
    "H100": Gpu(
        {"bfloat16": 989e12, "float16": 989e12, "tf32": 494.7e12, "float32": 67e12}, 80e9, 3.35e12, 450e9
    ),
    "A100": Gpu(
        {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12}, 80e9, 2.04e12, 300e9
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Attributes:
        gpus: in all, one process each.
        per_machine: GPUs of one machine.
        network: between machines, of each GPU and in one direction, bytes a second (400 Gbit/s are 50e9).
        disk: read by all processes together, bytes a second.
        cores: that decode images in front of the encoder.
    """

    gpu: Gpu
    gpus: int
    per_machine: int = 8
    network: float = 50e9
    disk: float = 2e9
    cores: int = 16

    @property
    def bandwidth(self) -> float:
        """What a ring over all GPUs is as fast as: its slowest link, bytes a second."""
        return self.gpu.link if self.gpus <= self.per_machine else min(self.gpu.link, self.network)


@dataclass(frozen=True)
class Work:
    """The run.

    Attributes:
        cost: of a pair.
        flops: of a pair as it is done, recomputed activations included.
        precision: of forward passes, a key of `Gpu.rates`.
        utilisation: share of the peak rate that is reached, of the denoiser and of the encoders alike.
        seconds_pair: of arithmetic, measured, instead of FLOPs and utilisation; 0 = not measured.
        optimizer: name of `train.optimizer`.
        sharded: fsdp instead of ddp.
        batch: pairs a GPU and pass.
        pairs: of an optimizer step, on all GPUs.
        steps: optimizer steps.
        encode_images, encode_caption: FLOPs of a pair's two images and of one caption.
        pixels: of one image.
        pair_bytes, caption_bytes: of the encoded store.
        rows: metric values that the whole run logs.
        averaged, mixed: copies in float32 that the settings want, see `costs.state_bytes`.
        encoded_ways: times that a pair's images are encoded: twice where they are mirrored too.
        stored_ways: rows of latents that the store has of a pair.
    """

    cost: Cost
    flops: float
    precision: str
    utilisation: float
    optimizer: str
    sharded: bool
    batch: int
    pairs: int
    steps: int
    encode_images: float
    encode_caption: float
    pixels: int
    pair_bytes: float
    caption_bytes: float
    rows: int
    seconds_pair: float = 0.0
    averaged: bool = False
    mixed: bool = False
    encoded_ways: int = 1
    stored_ways: int = 1

    @property
    def backward(self) -> float:
        """Share of the arithmetic that is the policy's backward pass: all but two forward passes of two images each.

        4 F of 8 F for a full fine-tune, about 2 F of 6 F for LoRA; recomputed activations belong to it.
        """
        return 1 - 4 * self.cost.forward / self.flops


@dataclass(frozen=True)
class Payload:
    """Bytes of the tensors that one process hands to collectives in an optimizer step; what is sent follows from them.

    Attributes:
        reduced: to an all-reduce.
        gathered: whole size of what all-gathers put together.
        scattered: to a reduce-scatter.
    """

    reduced: float = 0.0
    gathered: float = 0.0
    scattered: float = 0.0

    def sent(self, ranks: int) -> float:
        """Bytes that each of so many processes in a ring sends: an all-reduce is a reduce-scatter and an all-gather.

        Each of these two passes all parts but one's own on, (R - 1) / R of the whole (Patarasuk and Yuan 2009).
        """
        return (ranks - 1) / ranks * (2 * self.reduced + self.gathered + self.scattered)


def passes(pairs: int, batch: int, ranks: int) -> int:
    """Passes of each process in an optimizer step, `train.accumulation`, rounded up.

    All passes of a run are equal; rounded are those of GPUs that `reached` asks about and nobody can start a run on.
    """
    return -(-pairs // (batch * ranks))


def optimizer_seconds(trained: float, gpu: Gpu) -> float:
    """Seconds of clipping and the optimizer's move of so many weights, which is memory traffic and nothing else."""
    return OPTIMIZER_MOVES * FLOAT32 * trained / gpu.traffic


def payload(cost: Cost, sharded: bool, accumulation: int) -> Payload:
    """What a process gives to collectives in one optimizer step; metrics and norms are too few numbers to matter.

    ddp reduces the gradients of what is trained, once, in the last pass. fsdp gathers policy and reference in each
    pass, in float32 since a shard holds one precision, and scatters the gradients once.
    """
    if not sharded:
        return Payload(reduced=FLOAT32 * cost.trained)
    return Payload(
        gathered=accumulation * GATHERS * FLOAT32 * cost.weights,
        scattered=FLOAT32 * cost.trained,
    )  # fmt: skip


def gpu_bytes(work: Work, ranks: int) -> float:
    """Memory of one GPU that does not depend on the batch; activations come on top.

    ddp: as on one GPU. fsdp: a share of the policy's and the reference's float32 weights, of the gradients and of the
    optimizer's state; where a step has several passes, the gradients are kept whole until the last one sends them.
    """
    if not work.sharded:
        return state_bytes(work.cost, work.optimizer, work.precision, averaged=work.averaged, mixed=work.mixed)
    of_policy = state_bytes(work.cost, work.optimizer, "float32") - FLOAT32 * work.cost.weights
    whole = FLOAT32 * work.cost.trained if passes(work.pairs, work.batch, ranks) > 1 else 0
    return (of_policy + FLOAT32 * work.cost.weights) / ranks + whole


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        accumulation: passes of a process in a step.
        arithmetic: of a step on each GPU, seconds.
        optimizer: clipping and the optimizer's move of a step, seconds.
        sent: by each process in a step, bytes.
        communication: of a step, were nothing done meanwhile, seconds.
        hidden: of that, at most, beside arithmetic: ddp, in the last backward pass; fsdp, in all of it. Seconds.
        memory: of a GPU, without activations, bytes.
        read: from the encoded store in a step, by all processes, bytes.
        encoding: of all pairs on one GPU, which is how it is done, seconds.
        decoding: of all images on the CPU cores beside it, at the same time, seconds.
        stored: the encoded store, bytes.
        rows: metric values a second.
    """

    work: Work
    cluster: Cluster
    accumulation: int
    arithmetic: float
    optimizer: float
    sent: float
    communication: float
    hidden: float
    memory: float
    read: float
    encoding: float
    decoding: float
    stored: float
    rows: float

    @property
    def step(self) -> float:
        """An optimizer step with nothing of the communication hidden, seconds; `hidden` less where all of it is."""
        return self.arithmetic + self.optimizer + self.communication

    @property
    def training(self) -> float:
        """All steps, seconds."""
        return self.work.steps * self.step

    @property
    def encoded(self) -> float:
        """Pairs a second that one GPU and its cores encode, captions included."""
        return PICK_A_PIC[0] / max(self.encoding, self.decoding)

    @property
    def loads(self) -> dict[str, float]:
        """How much of each limit is used, the most first: 1 is the limit."""
        found = {
            "memory of a GPU, activations not counted": self.memory / self.cluster.gpu.memory,
            "communication against arithmetic": self.communication / self.arithmetic,
            "optimizer against arithmetic": self.optimizer / self.arithmetic,
            "reading the store against the disk": self.read / self.step / self.cluster.disk,
            "encoding on one GPU against the whole training": max(self.encoding, self.decoding) / self.training,
            "metrics against what the store takes": self.rows / STORE_ROWS,
        }
        return dict(sorted(found.items(), key=lambda one: -one[1]))


def plan(work: Work, cluster: Cluster) -> Plan:
    """Everything that a run on these machines takes."""
    gpu, ranks = cluster.gpu, cluster.gpus
    accumulation = passes(work.pairs, work.batch, ranks)
    pair = work.seconds_pair or work.flops / (gpu.rates[work.precision] * work.utilisation)
    arithmetic = work.pairs / ranks * pair
    sent = payload(work.cost, work.sharded, accumulation).sent(ranks)
    communication = sent / cluster.bandwidth
    window = arithmetic if work.sharded else work.backward * arithmetic / accumulation
    pairs, captions = PICK_A_PIC
    # The autoencoder runs in float32, nearly all convolutions; the text encoders in the run's precision.
    images = work.encode_images / (gpu.rates["tf32"] * work.utilisation)
    text = work.encode_caption / (gpu.rates[work.precision] * work.utilisation)
    found = Plan(
        work, cluster, accumulation,
        arithmetic=arithmetic,
        optimizer=optimizer_seconds(work.cost.trained / (ranks if work.sharded else 1), gpu),
        sent=sent,
        communication=communication,
        hidden=min(communication, window),
        memory=gpu_bytes(work, ranks),
        read=work.pairs * (work.pair_bytes + work.caption_bytes),
        encoding=pairs * work.encoded_ways * images + captions * text,
        decoding=2 * pairs * (DECODE[0] + DECODE[1] * work.pixels) / cluster.cores,
        stored=pairs * work.stored_ways * work.pair_bytes + captions * work.caption_bytes,
        rows=0.0,
    )  # fmt: skip
    return replace(found, rows=work.rows / found.training)


def reached(work: Work, cluster: Cluster) -> dict[str, int | None]:
    """With how many GPUs each limit is reached; None = not while a step has pairs for more.

    In the order of `Plan.loads`. The number of GPUs is doubled while the pairs of a step fill their batches; the step
    stays the same.
    """
    found: dict[str, int | None] = dict.fromkeys(plan(work, cluster).loads)
    # The number that was asked for counts, even where its batches are not full.
    gpus = cluster.gpus
    while gpus == cluster.gpus or gpus * work.batch <= work.pairs:
        loads = plan(work, replace(cluster, gpus=gpus)).loads
        found |= {name: gpus for name, load in loads.items() if load >= 1 and found[name] is None}
        gpus *= 2
    return found
