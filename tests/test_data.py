import polars as pl
import pytest
import torch
from conftest import pair_rows
from safetensors.torch import load_file

from workbench import cache, data
from workbench.backends import StableDiffusion
from workbench.data import batches, encode, read_pairs, read_prompts
from workbench.errors import UserError


def write(tmp_path, rows, **kwargs):
    path = tmp_path / "pairs.parquet"
    pl.DataFrame(rows, **kwargs).write_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def backend(tiny_model):
    return StableDiffusion(str(tiny_model), torch.device("cpu"))


def test_the_label_decides_which_image_is_the_winner(tmp_path):
    rows = pair_rows(4)
    frame = read_pairs(write(tmp_path, rows), "train").frame
    for row, found in zip(rows, frame.iter_rows(named=True), strict=True):
        first = row["label_0"] == 1
        assert found["jpg_w"] == row["jpg_0" if first else "jpg_1"]
        assert found["jpg_l"] == row["jpg_1" if first else "jpg_0"]


def test_ties_unlabelled_and_invalid_rows_are_dropped_and_counted(tmp_path):
    rows = pair_rows(8)
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    rows[1] |= {"has_label": False}
    rows[2] |= {"label_0": 1.0, "label_1": 1.0}
    rows[3] |= {"jpg_0": None}
    rows[4] |= {"label_0": None}
    pairs = read_pairs(write(tmp_path, rows), "train")
    assert pairs.counts == {"rows": 8, "used": 3, "ties": 1, "unlabelled": 1, "invalid": 3}
    assert pairs.frame["row"].to_list() == [5, 6, 7]


def test_a_missing_column_is_named(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "label_1"} for row in pair_rows(2)]
    with pytest.raises(UserError, match="no column label_1"):
        read_pairs(write(tmp_path, rows), "train")


def test_has_label_may_be_absent(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "has_label"} for row in pair_rows(2)]
    assert read_pairs(write(tmp_path, rows), "train").counts["used"] == 2


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    rows = pair_rows(4)
    pl.DataFrame(rows[:2]).write_parquet(tmp_path / "0.parquet")
    pl.DataFrame(rows[2:]).write_parquet(tmp_path / "1.parquet")
    assert read_pairs(str(tmp_path), "train").frame["caption"].to_list() == [r["caption"] for r in rows]


def test_files_that_are_not_pairs_are_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    for source, message in (
        (str(tmp_path / "x.parquet"), "not readable"),
        (str(tmp_path / "no"), "no such parquet file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_pairs(source, "train")
        assert "\n" not in str(error.value) and "data.train" in str(error.value)


def test_only_ties_is_an_error(tmp_path):
    rows = [row | {"label_0": 0.5, "label_1": 0.5} for row in pair_rows(2)]
    with pytest.raises(UserError, match="no usable row among 2"):
        read_pairs(write(tmp_path, rows), "train")


def test_an_image_that_cannot_be_decoded_is_named_by_its_row(tmp_path, backend, workplace):
    rows = pair_rows(3)
    rows[2]["jpg_1"] = rows[2]["jpg_1"][:40]
    with pytest.raises(UserError, match="row 2: an image cannot be decoded"):
        encode(read_pairs(write(tmp_path, rows), "train"), backend)
    assert not list(cache.folder().glob("pairs-*"))


def test_encoded_pairs_agree_with_encoding_each_image(tiny_pairs, backend, workplace):
    pairs = read_pairs(str(tiny_pairs), "train")
    encoded = encode(pairs, backend, batch_size=5)
    row = pairs.frame.row(7, named=True)
    latent = backend.encode_images([data._decode(row["jpg_w"], "row 7")])[0]
    torch.testing.assert_close(encoded.x_w[7], latent, atol=1e-5, rtol=1e-4)
    text = backend.encode_text([row["caption"]])[0]
    torch.testing.assert_close(encoded.text[encoded.caption[7]], text, atol=1e-5, rtol=1e-4)


def test_pairs_are_encoded_once(tiny_pairs, backend, workplace, monkeypatch):
    first = encode(read_pairs(str(tiny_pairs), "train"), backend)
    monkeypatch.setattr(backend, "encode_images", None)
    again = encode(read_pairs(str(tiny_pairs), "train"), backend)
    assert torch.equal(first.x_l, again.x_l) and first.digest == again.digest


def test_other_data_have_another_digest(tiny_pairs, backend, workplace):
    whole = encode(read_pairs(str(tiny_pairs), "train"), backend)
    assert encode(read_pairs(str(tiny_pairs), "train", limit=5), backend).digest != whole.digest


def test_a_damaged_cache_is_computed_again(workplace):
    key = cache.digest("x")
    compute = lambda: {"x": torch.ones(3)}  # noqa: E731
    cache.cached("kind", key, compute)
    (path,) = cache.folder().glob("kind-*")
    path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(cache.cached("kind", key, compute)["x"], torch.ones(3))
    assert torch.equal(load_file(path)["x"], torch.ones(3))


def test_every_pair_is_seen_once_an_epoch(tiny_pairs, backend, workplace):
    encoded = encode(read_pairs(str(tiny_pairs), "train"), backend)
    stream = batches(encoded, 5, torch.Generator().manual_seed(0), torch.device("cpu"))
    seen = torch.cat([next(stream).x_w for _ in range(24)])  # five epochs of 24 pairs
    for latent in encoded.x_w:
        assert (seen == latent).all((1, 2, 3)).sum() == 5


def test_a_batch_larger_than_the_data_is_refused(tiny_pairs, backend, workplace):
    encoded = encode(read_pairs(str(tiny_pairs), "train", limit=3), backend)
    with pytest.raises(UserError, match=r"train\.batch_size = 4: only 3 pairs"):
        next(batches(encoded, 4, torch.Generator(), torch.device("cpu")))


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "q.txt"))
