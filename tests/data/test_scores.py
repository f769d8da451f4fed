"""Scores that stand beside the images: read where they are asked for, kept with encoded pairs, in every batch."""

import io
from pathlib import Path

import polars as pl
import pytest
import torch
from PIL import Image
from torch import Generator

from tests.support.helpers import pair_rows
from tests.support.runs import run
from workbench.common.errors import UserError
from workbench.data.encoding import Encoding, encode, key_of
from workbench.data.images import fit
from workbench.data.rows import decode, open_rows
from workbench.data.streaming import StreamedPairs
from workbench.models import load
from workbench.training.config import resolve
from workbench.training.preparation import open_pairs

CPU = torch.device("cpu")
SCORED = Encoding(scores="reward")


@pytest.fixture(scope="module")
def backend(tiny_model):
    return load(str(tiny_model), CPU)


@pytest.fixture
def scored(workplace):
    """12 pairs whose second image is worth more by their number, in tenths; number 5 has no score."""
    rows = [row | {"reward_0": 1.0, "reward_1": 1.0 + i / 10} for i, row in enumerate(pair_rows(12))]
    rows[5]["reward_1"] = None
    pl.DataFrame(rows).write_parquet("scored.parquet")
    return "scored.parquet"


def expected():
    """The second image wins where the number is even."""
    return torch.tensor([i / 10 * (1 if i % 2 == 0 else -1) for i in range(12) if i != 5])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gaps_are_the_winners_score_minus_the_losers(dtype, scored, backend):
    pairs = encode(open_rows(scored, "train", "reward"), backend, Encoding(scores="reward", dtype=dtype))
    assert pairs.counts == {"used": 11, "invalid": 1}
    torch.testing.assert_close(pairs.gather(torch.arange(11), CPU).gap, expected())


def test_mirrored_pairs_and_several_shards_have_them_too(scored, backend):
    how = Encoding(scores="reward", flip=True)
    pairs = encode(open_rows(scored, "train", "reward"), backend, how, shard=4, batch_size=4)
    gaps = pairs.gather(torch.arange(22), CPU).gap.sort().values
    torch.testing.assert_close(gaps, torch.cat([expected(), expected()]).sort().values)


def test_streamed_pairs_have_them(scored, backend):
    pytest.importorskip("datasets")
    streamed = StreamedPairs(open_rows(scored, "train", "reward"), backend, SCORED)
    batch = next(streamed.batches(11, Generator().manual_seed(0), CPU))
    torch.testing.assert_close(batch.gap.sort().values, expected().sort().values)


def test_without_scores_nothing_changes(scored, backend):
    rows = open_rows(scored, "train")
    pairs = encode(rows, backend)
    assert pairs.gather(torch.arange(3), CPU).gap is None and len(pairs) == 12
    keys = {
        key_of(rows, backend, e) for e in (Encoding(), SCORED, Encoding(resize="bilinear"), Encoding(crop="random"))
    }
    assert len(keys) == 4 and repr(SCORED) == "Encoding(limit=0, flip=False, dtype='float32')"


def test_data_without_these_columns_are_refused_in_one_line(scored, tiny_pairs, tiny, backend):
    with pytest.raises(UserError, match=r"data\.scores = 'pick': .* has no column pick_0, pick_1"):
        open_rows(scored, "train", "pick")
    with pytest.raises(UserError, match=r"objective\.label = 'soft': needs scores .* data\.scores"):
        resolve({"objective.label": "soft"})
    encode(open_rows(str(tiny_pairs), "train"), backend, into=Path("store"))
    source = resolve(tiny | {"data.train": "store", "data.scores": "reward"}).data
    with pytest.raises(UserError, match=r"data\.scores = 'reward': store was encoded with none; encode again"):
        open_pairs(source, "train", backend)


def test_soft_labels_train(scored, tiny):
    cheap = {"evaluation.seeds": 0, "evaluation.grid": 0, "data.train": scored, "data.scores": "reward"}
    soft = {"objective.label": "soft", "objective.temperature": 0.2}
    hard, ours = (run(tiny | cheap | changes) for changes in ({}, soft))
    assert ours["train/loss"] != hard["train/loss"] and ours.keys() == hard.keys()


def test_resizing_is_pillows():
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    for name, kind in (("bicubic", 3), ("bilinear", 2), ("lanczos", 1)):
        theirs = image.resize((48, 32), kind).crop((8, 0, 40, 32))
        assert fit(image, 32, name)[0].tobytes() == theirs.tobytes()
    assert fit(image, 32)[0].tobytes() == fit(image, 32, "bicubic")[0].tobytes()


def test_a_random_crop_lies_along_the_longer_edge_and_is_the_pairs_own():
    def cropped(*images):
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.save(file, "PNG")
        first, second = (file.getvalue() for file in files)
        row = {"caption": "a", "jpg_0": first, "jpg_1": second, "label_0": 1, "label_1": 0}
        return decode(row, 32, crop="random")

    noise = [Image.effect_noise(edges, 80).convert("RGB") for edges in [(96, 32)] * 40 + [(32, 96)] * 40]
    pairs = [cropped(image, image.rotate(180)) for image in noise]
    assert [p.corner for p in pairs[:9]] == [cropped(image, image.rotate(180)).corner for image in noise[:9]]
    wide, tall = pairs[:40], pairs[40:]
    assert {pair.corner[0] for pair in wide} == {0} and {pair.corner[1] for pair in tall} == {0}
    along = [pair.corner[1] for pair in wide] + [pair.corner[0] for pair in tall]
    assert min(along) < 10 and max(along) > 54 and len(set(along)) > 20
    for pair, image in zip(pairs, noise, strict=True):  # both images at one place
        top, left = pair.corner
        box = left, top, left + 32, top + 32
        assert pair.w.tobytes() == image.crop(box).tobytes()
        assert pair.l.tobytes() == image.rotate(180).crop(box).tobytes()
