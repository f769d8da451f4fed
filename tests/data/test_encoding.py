import json

import polars as pl
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.support.helpers import pair_rows
from workbench.common import cache
from workbench.common.errors import UserError
from workbench.common.paths import cache_folder
from workbench.data import encoding
from workbench.data.encoding import Encoding, encode, in_memory, open_store
from workbench.data.pairs import EncodedPairs
from workbench.data.rows import StreamedRows, decode, open_rows
from workbench.data.streaming import StreamedPairs, Turns
from workbench.data.subset import drawn
from workbench.models import load
from workbench.training.config import resolve
from workbench.training.preparation import encoding_of, open_pairs, rows_of
from workbench.training.tables import Data

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("brief_epochs")


@pytest.fixture(scope="module")
def backend(tiny_model):
    return load(str(tiny_model), CPU)


@pytest.fixture
def rows(tmp_path):
    """40 rows of 12 captions, one of them a tie and one undecodable."""
    table = [row | {"caption": pair_rows(12)[i * 7 % 12]["caption"]} for i, row in enumerate(pair_rows(40))]
    table[5] |= {"label_0": 0.5, "label_1": 0.5}
    table[17]["jpg_1"] = b"not an image"
    pl.DataFrame(table).write_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def whole(pairs):
    return pairs.gather(torch.arange(len(pairs)), CPU)


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in ((a.x_w, b.x_w), (a.x_l, b.x_l), (a.condition["text"], b.condition["text"]))
    )


def test_encoded_pairs_agree_with_encoding_each_alone(tiny_pairs, backend, workplace):
    found = whole(encode(open_rows(str(tiny_pairs), "train"), backend))
    row = pl.read_parquet(tiny_pairs).row(7, named=True)
    pair = decode(row, backend.resolution)
    torch.testing.assert_close(found.x_w[7], backend.encode_images(pair.w[None])[0], atol=1e-5, rtol=1e-4)
    text = backend.encode_text([row["caption"]])["text"][0]
    torch.testing.assert_close(found.condition["text"][7], text, atol=1e-5, rtol=1e-4)


def test_what_becomes_of_rows_is_counted_and_kept(rows, backend, workplace):
    for _ in range(2):
        assert encode(open_rows(rows, "train"), backend).counts == {"used": 38, "ties": 1, "undecodable": 1}


def test_pairs_are_encoded_once(tiny_pairs, backend, workplace, monkeypatch):
    first = encode(open_rows(str(tiny_pairs), "train"), backend)
    monkeypatch.setattr(backend, "encode_images", None)
    again = encode(open_rows(str(tiny_pairs), "train"), backend)
    assert same(whole(first), whole(again)) and first.digest == again.digest


def test_changed_data_settings_or_model_have_another_digest(tiny_pairs, rows, backend, workplace):
    key = lambda source, **how: encoding.key_of(open_rows(source, "train"), backend, Encoding(**how))  # noqa: E731
    kinds = {key(str(tiny_pairs)), key(rows), key(rows, limit=5), key(rows, flip=True), key(rows, dtype="float16")}
    pl.read_parquet(rows).reverse().write_parquet(rows)
    assert len(kinds | {key(rows)}) == 6


@pytest.mark.parametrize("flip", [False, True])
def test_shards_hold_what_one_shard_holds(rows, backend, workplace, flip):
    one = encode(open_rows(rows, "train"), backend, Encoding(flip=flip), into=workplace / "one", batch_size=4)
    many = encode(
        open_rows(rows, "train"), backend, Encoding(flip=flip), into=workplace / "many", shard=8, batch_size=4
    )
    assert len(many.shards) > 3 and len(one) == len(many) == (76 if flip else 38)
    assert same(whole(one), whole(many))
    index = torch.tensor([37, 0, 12, 12, 5])
    assert same(many.gather(index, CPU), one.gather(index, CPU))


def test_flipped_pairs_are_mirrored_both(tiny_pairs, backend, workplace):
    pairs = encode(open_rows(str(tiny_pairs), "train"), backend, Encoding(flip=True), batch_size=24)
    pair = decode(pl.read_parquet(tiny_pairs).row(3, named=True), backend.resolution)
    mirrored = backend.encode_images(pair.l[None, :, ::-1].copy())[0]
    torch.testing.assert_close(whole(pairs).x_l[24 + 3], mirrored, atol=1e-5, rtol=1e-4)


def test_independent_flips_hold_each_image_mirrored_by_itself(tiny_pairs, backend, workplace):
    pairs = encode(open_rows(str(tiny_pairs), "train"), backend, Encoding(flip="independent"), batch_size=24)
    row = decode(pl.read_parquet(tiny_pairs).row(3, named=True), backend.resolution)
    plain, turned = ([backend.encode_images(x[None, :, ::step].copy())[0] for x in (row.w, row.l)] for step in (1, -1))
    held = whole(pairs)
    assert len(pairs) == 4 * 24
    for place, (w, l) in enumerate([plain, turned, (plain[0], turned[1]), (turned[0], plain[1])]):  # noqa: E741
        torch.testing.assert_close(held.x_w[24 * place + 3], w, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(held.x_l[24 * place + 3], l, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("flip", "ways"), [(True, 2), ("independent", 4)])
def test_streamed_pairs_are_mirrored_by_chance_in_the_same_ways(tiny_pairs, backend, flip, ways):
    plain = open_rows(str(tiny_pairs), "train")
    both = whole(in_memory(plain, backend, Encoding(flip="independent")))
    known = torch.cat([both.x_w, both.x_l], 1).flatten(1).reshape(4, 24, -1)  # by way, then by row
    stream = StreamedPairs(plain, backend, Encoding(flip=flip)).batches(24, torch.Generator().manual_seed(0), CPU)
    met = set()
    for batch in (next(stream) for _ in range(2)):
        seen = torch.cat([batch.x_w, batch.x_l], 1).flatten(1)
        distance = (known[:, None] - seen[None, :, None]).abs().amax(-1)  # (way, place, row)
        way, row = torch.tensor([divmod(int(d.argmin()), 24) for d in distance.transpose(0, 1).reshape(24, -1)]).T
        assert sorted(row.tolist()) == list(range(24))
        met |= set(way.tolist())
    assert met == set(range(ways))


def test_a_seeded_part_of_the_rows_is_drawn_from_those_that_count(rows, backend, workplace):
    source = Data(train=str(rows), limit=9, limit_seed=4)
    taken = encode(rows_of(source, "train"), backend, encoding_of(source, "train"), batch_size=4)
    every = whole(encode(open_rows(rows, "train"), backend)).x_w
    places = [int((every - x).flatten(1).abs().amax(1).argmin()) for x in whole(taken).x_w]
    assert 8 <= len(taken) <= 9  # one of the rows that count has a damaged image
    assert places == sorted(set(places)) != list(range(len(taken)))
    again, other = (rows_of(source.model_copy(update={"limit_seed": n}), "train") for n in (4, 5))
    assert again.digest == rows_of(source, "train").digest != other.digest and again.chosen != other.chosen
    # Read on in the middle, as after a kill, and through Hugging Face datasets: the same rows.
    read = [row["caption"] for chunk, _ in again.chunks(4) for row in chunk]
    assert [row["caption"] for chunk, _ in again.chunks(4, done=5) for row in chunk] == read[5:]
    assert [row["caption"] for chunk, _ in again.stream().chunks(4) for row in chunk] == read


def test_of_a_store_or_a_hub_no_random_part_is_drawn(rows, tiny_model, backend, workplace):
    store = encode(open_rows(rows, "train"), backend, into=workplace / "store")
    with pytest.raises(UserError, match=r"data\.limit_seed = 1: .* is encoded already, with more pairs than 5"):
        open_pairs(Data(train=str(workplace / "store"), limit=5, limit_seed=1), "train", backend)
    assert len(open_pairs(Data(train=str(workplace / "store"), limit=len(store), limit_seed=1), "train", backend)) == 38
    with pytest.raises(UserError, match=r"data\.limit_seed = 1: data\.train = 'a/b' would have to be read whole"):
        drawn(StreamedRows("digest", "data.train = 'a/b'", 0, None, remote=True), 5, 1)


def test_half_precision_on_disk_is_read_as_float32(tiny_pairs, backend, workplace):
    pairs = encode(open_rows(str(tiny_pairs), "train"), backend, Encoding(dtype="float16"))
    assert pairs.shards[0]["x_w"].dtype == torch.float16 and whole(pairs).x_w.dtype == torch.float32
    exact = whole(encode(open_rows(str(tiny_pairs), "train"), backend))
    torch.testing.assert_close(whole(pairs).x_w, exact.x_w, atol=2e-2, rtol=1e-3)


def test_killed_and_continued_it_is_the_same_to_the_byte(rows, backend, workplace, monkeypatch):
    reference = workplace / "reference"
    encode(open_rows(rows, "train"), backend, into=reference, shard=8, batch_size=4)
    calls, original = [0], encoding._write

    def dies(*arguments):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(encoding, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(open_rows(rows, "train"), backend, into=workplace / "killed", shard=8, batch_size=4)
    assert not (workplace / "killed" / "index.json").exists()
    monkeypatch.setattr(encoding, "_write", original)
    seen = []
    monkeypatch.setattr(backend, "encode_images", lambda x, f=backend.encode_images: seen.append(len(x)) or f(x))
    encode(open_rows(rows, "train"), backend, into=workplace / "killed", shard=8, batch_size=4)
    assert sum(seen) < 2 * 38  # not from the beginning
    names = sorted(f.name for f in reference.iterdir())
    assert names == sorted(f.name for f in (workplace / "killed").iterdir())
    assert all((reference / n).read_bytes() == (workplace / "killed" / n).read_bytes() for n in names)


def test_a_shard_that_is_cut_off_is_named_and_encoded_again(rows, backend, workplace):
    place = workplace / "store"
    before = whole(encode(open_rows(rows, "train"), backend, into=place, shard=8, batch_size=4))
    shard = place / "pairs-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(UserError, match=r"pairs-00001\.safetensors: 500 of \d+ bytes; delete index\.json"):
        encode(open_rows(rows, "train"), backend, into=place, shard=8, batch_size=4)
    (place / "index.json").unlink()
    assert same(before, whole(encode(open_rows(rows, "train"), backend, into=place, shard=8, batch_size=4)))


def test_a_shard_whose_numbers_have_changed_is_found(rows, backend, workplace):
    place = workplace / "store"
    how = dict(into=place, shard=8, batch_size=4, check=True)
    encode(open_rows(rows, "train"), backend, **how)
    encode(open_rows(rows, "train"), backend, **how)
    shard = place / "pairs-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100] + bytes([255]) * 100)
    with pytest.raises(UserError, match=r"pairs-00002\.safetensors: is not what was written; delete it"):
        encode(open_rows(rows, "train"), backend, **how)


def test_a_folder_of_other_data_is_not_taken_for_these(rows, tiny_pairs, backend, workplace):
    place = workplace / "store"
    encode(open_rows(rows, "train"), backend, into=place)
    with pytest.raises(UserError, match="encoded from other data"):
        encode(open_rows(str(tiny_pairs), "train"), backend, into=place)
    (place / "index.json").unlink()
    with pytest.raises(UserError, match="holds shards of other data"):
        encode(open_rows(str(tiny_pairs), "train"), backend, into=place)


def test_a_store_of_another_model_is_refused(rows, backend, workplace):
    encode(open_rows(rows, "train"), backend, into=workplace / "store")
    other = load(str(backend.folder), CPU, resolution=64)
    with pytest.raises(UserError, match=r"encoded by another autoencoder.*32 px.*64 px"):
        open_store(workplace / "store", backend=other)
    index = json.loads((workplace / "store" / "index.json").read_text())
    (workplace / "store" / "index.json").write_text(json.dumps(index | {"format": "pairs-0"}))
    with pytest.raises(UserError, match="format 'pairs-0'"):
        open_store(workplace / "store", backend=backend)


def test_of_a_store_the_first_pairs_can_be_taken_and_its_flips_must_be_as_asked(rows, backend, workplace):
    pairs = encode(open_rows(rows, "train"), backend, Encoding(flip=True), into=workplace / "store")
    assert len(pairs.first(5)) == 5 and pairs.first(100) is pairs and pairs.first(5).digest != pairs.digest
    with pytest.raises(UserError, match=r"holds mirrored pairs too, so no 5 of them"):
        open_store(workplace / "store", backend=backend, limit=5)
    with pytest.raises(UserError, match=r"data\.flip = false: .* was encoded with true"):
        open_store(workplace / "store", backend=backend, flip=False)


def test_a_store_whose_images_were_resized_otherwise_is_refused(rows, tiny, backend, workplace):
    place = workplace / "store"
    encode(open_rows(rows, "train"), backend, into=place)
    index = json.loads((place / "index.json").read_text())
    del index["resize"], index["crop"]  # as stores have it that were made before it could be chosen
    (place / "index.json").write_text(json.dumps(index))
    stores = {"data.train": str(place), "data.validation": str(place)}
    wanted, other = (resolve(tiny | stores | {"data.resize": how}).data for how in ("bicubic", "bilinear"))
    for split in ("train", "validation"):
        assert len(open_pairs(wanted, split, backend))
        with pytest.raises(UserError, match=r"data\.resize = 'bilinear': .*store was encoded with 'bicubic'"):
            open_pairs(other, split, backend)
    cropped = resolve(tiny | stores | {"data.crop": "random"}).data
    assert len(open_pairs(cropped, "validation", backend))
    with pytest.raises(UserError, match=r"data\.crop = 'random': .*store was encoded with 'center'"):
        open_pairs(cropped, "train", backend)


def test_nothing_usable_is_an_error_that_says_why(tmp_path, backend, workplace):
    ties = [row | {"label_0": 0.5, "label_1": 0.5} for row in pair_rows(2)]
    pl.DataFrame(ties).write_parquet(tmp_path / "ties.parquet")
    with pytest.raises(UserError, match=r"no usable row .2 rows: 0 used, 2 ties"):
        encode(open_rows(str(tmp_path / "ties.parquet"), "train"), backend)
    assert not list(cache_folder().glob("pairs-*"))


def test_a_full_disk_is_one_line_and_whole_shards_stay(rows, backend, workplace, monkeypatch):
    from workbench.common.errors import Failure

    original, calls = encoding.save_file, [0]

    def full(*arguments, **options):
        calls[0] += 1
        if calls[0] > 2:
            raise SafetensorError("I/O error: No space left on device")
        original(*arguments, **options)

    monkeypatch.setattr(encoding, "save_file", full)
    with pytest.raises(Failure, match=r"cannot be written .*No space left"):
        encode(open_rows(rows, "train"), backend, into=workplace / "s", shard=8, batch_size=4)
    assert sorted(f.name for f in (workplace / "s").iterdir()) == [f"pairs-{i:05d}.safetensors" for i in range(2)]


def test_the_limit_counts_pairs_that_count(rows, backend, workplace):
    assert len(encode(open_rows(rows, "train"), backend, Encoding(limit=7))) == 7
    exact = encode(open_rows(rows, "train"), backend)
    first = exact.gather(torch.arange(7), CPU).x_w
    limited = whole(in_memory(open_rows(rows, "train"), backend, Encoding(limit=7))).x_w
    torch.testing.assert_close(limited, first, atol=1e-5, rtol=1e-4)


def test_rows_beyond_the_limit_are_not_counted(tmp_path, backend, workplace):
    table = pair_rows(12)
    for row in table[6:]:
        row |= {"label_0": 0.5, "label_1": 0.5}
    pl.DataFrame(table).write_parquet(tmp_path / "ties.parquet")
    for size in (1, 5, 64):
        pairs = in_memory(open_rows(str(tmp_path / "ties.parquet"), "train"), backend, Encoding(limit=6), size)
        assert pairs.counts == {"used": 6}


def test_every_pair_is_seen_once_an_epoch(tiny_pairs, backend, workplace):
    encoded = encode(open_rows(str(tiny_pairs), "train"), backend)
    stream = encoded.batches(5, torch.Generator().manual_seed(0), CPU)
    seen = torch.cat([next(stream).x_w for _ in range(24)])  # five epochs of 24 pairs
    for latent in whole(encoded).x_w:
        assert (seen == latent).all((1, 2, 3)).sum() == 5


def test_a_batch_larger_than_the_data_is_refused(tiny_pairs, backend, workplace):
    encoded = encode(open_rows(str(tiny_pairs), "train"), backend, Encoding(limit=3))
    with pytest.raises(UserError, match=r"train\.batch_size = 4: only 3 pairs"):
        next(encoded.batches(4, torch.Generator(), CPU))


def test_streamed_pairs_are_the_encoded_ones_in_another_order(tiny_pairs, backend, workplace):
    encoded = whole(encode(open_rows(str(tiny_pairs), "train"), backend))
    streamed = StreamedPairs(open_rows(str(tiny_pairs), "train"), backend, Encoding())
    stream = streamed.batches(6, torch.Generator().manual_seed(0), CPU)
    found = [next(stream) for _ in range(8)]  # two epochs of 24
    for side in ("x_w", "x_l"):
        seen = torch.cat([getattr(batch, side) for batch in found])
        distance = torch.cdist(seen.flatten(1), getattr(encoded, side).flatten(1))
        assert (
            torch.bincount(distance.argmin(1), minlength=24).tolist() == [2] * 24
            and distance.min(1).values.max() < 0.02
        )
    assert not torch.equal(found[0].x_w, found[4].x_w)  # the epochs are shuffled anew
    assert isinstance(streamed.sample(5), EncodedPairs) and len(streamed.sample(5)) == 5


def test_streamed_pairs_keep_to_the_limit_and_count_what_they_drop(rows, backend, workplace):
    encoded = whole(encode(open_rows(rows, "train"), backend))
    streamed = StreamedPairs(open_rows(rows, "train"), backend, Encoding(limit=20))
    stream = streamed.batches(4, torch.Generator().manual_seed(0), CPU)
    seen = torch.cat([next(stream).x_w for _ in range(30)])
    found = torch.cdist(seen.flatten(1), encoded.x_w.flatten(1)).argmin(1).tolist()
    assert set(found) <= set(range(20)) and len(set(found)) == 19  # one of the first 20 cannot be decoded
    assert streamed.counts["undecodable"] == 1 or streamed.counts["used"] < 19


def test_the_processes_of_a_run_share_streamed_batches(monkeypatch):
    both = []
    for rank in range(2):
        monkeypatch.setattr(encoding.distributed, "world", lambda: 2)
        monkeypatch.setattr(encoding.distributed, "part_of", lambda n, r=rank: slice(r * n, (r + 1) * n))
        turns = Turns(3)
        both.append(turns(list(range(8))) + turns(list(range(8, 13))))
    assert both == [[0, 1, 2, 6, 7, 8, 12], [3, 4, 5, 9, 10, 11]]


def test_a_damaged_cache_is_computed_again(workplace):
    key = cache.digest("x")
    compute = lambda: {"x": torch.ones(3)}  # noqa: E731
    cache.cached("kind", key, compute)
    (path,) = cache_folder().glob("kind-*")
    path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(cache.cached("kind", key, compute)["x"], torch.ones(3))
    assert torch.equal(load_file(path)["x"], torch.ones(3))


def test_images_that_are_encoded_side_by_side_make_the_same_store(rows, backend, tmp_path, monkeypatch):
    stores = []
    for threads in (1, 3):
        monkeypatch.setattr(encoding, "cores", lambda threads=threads: threads)
        place = tmp_path / str(threads)
        encode(open_rows(rows, "train"), backend, Encoding(flip=True), into=place, shard=20, batch_size=4)
        stores.append({path.name: path.read_bytes() for path in place.iterdir()})
    assert stores[0] == stores[1] and len(stores[0]) > 3


def test_the_pipeline_is_loaded_before_threads_encode(rows, tiny_model, monkeypatch):
    # From Python 3.12 on, cached_property has no lock: threads that all find it missing would all load it.
    fresh, loaded = load(str(tiny_model), torch.device("cpu")), []
    before = encoding.latents_of
    monkeypatch.setattr(encoding, "encoders", lambda backend: 2)
    monkeypatch.setattr(
        encoding, "latents_of", lambda *args: (loaded.append("pipeline" in fresh.__dict__), before(*args))[1]
    )
    in_memory(open_rows(rows, "train"), fresh, Encoding(), batch_size=4)
    assert loaded and all(loaded)
