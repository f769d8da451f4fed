"""Whatever is in a setting or a file, only a mistake of the user's comes of it: random input, random damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.common.errors import Failure, UserError, on_one_line
from workbench.data.encoding import encode
from workbench.data.rows import decode, kind_of, open_rows
from workbench.data.store import open_store
from workbench.evaluation import prompt_sets
from workbench.models import load
from workbench.studies.experiment import Experiment
from workbench.studies.tuning import candidates
from workbench.training import config, experiment_file

CPU = torch.device("cpu")
EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
many = settings(few, max_examples=150)

any_text = st.text(st.characters(), max_size=40)
names = st.sampled_from(config.known_names()) | any_text
plain = (
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.dates() | st.times()
    | st.sampled_from(["dpo", "frozen", "threshold", "discounted", "IntDistribution", "embedded", "eval/win_rate"])
)  # fmt: skip
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)


def mistake(error: Exception) -> bool:
    """Whether this is a user's mistake, told in a line."""
    return isinstance(error, UserError) and on_one_line(str(error)).isprintable() and bool(str(error))


def damaged(draw, whole: bytes) -> bytes:
    """Bytes of which some are others, gone, twice or new."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(found) - 1)))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "zero", "repeat"])):
            case "flip" if found:
                found[place] ^= draw(st.integers(1, 255))
            case "cut":
                del found[place:]
            case "drop":
                del found[place : place + draw(st.integers(1, 64))]
            case "insert":
                found[place:place] = draw(st.binary(min_size=1, max_size=16))
            case "zero":
                found[place : place + 32] = bytes(len(found[place : place + 32]))
            case "repeat":
                found[place:place] = found[place : place + 64]
    return bytes(found)


@many
@given(st.lists(st.tuples(names, st.sampled_from(["=", " = ", "", "=="]), any_text | values.map(str)), max_size=3))
def test_any_override_is_taken_or_a_mistake(given_texts):
    try:
        experiment_file.load(None, dict(experiment_file.parse_override("".join(parts)) for parts in given_texts))
    except UserError as error:
        assert mistake(error)


def all_of(flat):
    """Everything that reads settings before a study runs."""
    found = config.resolve(flat)
    candidates(Experiment.resolve(flat))
    return found


sections = st.sampled_from(sorted(config.Config.model_fields))
sweeps = st.dictionaries(
    st.sampled_from(sorted(config.Config.model_fields["sweep"].annotation.model_fields)), values, max_size=3
)
trees = st.dictionaries(sections | names, values | st.dictionaries(names, values, max_size=3), max_size=3)


@many
@given(trees, sweeps)
def test_any_tree_of_settings_is_taken_or_a_mistake(tree, sweep):
    try:
        all_of(config.dotted(tree | ({"sweep": sweep} if sweep else {})))
    except UserError as error:
        assert mistake(error)


@many
@given(st.data())
def test_a_damaged_experiment_is_taken_or_a_mistake(tmp_path, data):
    path = tmp_path / "e.toml"
    path.write_bytes(damaged(data.draw, data.draw(st.sampled_from(EXPERIMENTS)).read_bytes()))
    try:
        all_of(experiment_file.read(path))
    except UserError as error:
        assert mistake(error)


@few
@given(st.data())
def test_a_damaged_parquet_file_is_read_or_a_mistake(tiny_pairs, tmp_path, data):
    path = tmp_path / "x.parquet"
    path.write_bytes(damaged(data.draw, tiny_pairs.read_bytes()))
    try:
        for chunk, _ in open_rows(str(path), "train").chunks(8):
            for row in chunk:
                assert kind_of(row) != "used" or decode(row, 8) is None or decode(row, 8).w.shape == (8, 8, 3)
    except UserError as error:
        assert mistake(error)
    try:
        prompt_sets.read(str(path))
    except UserError as error:
        assert mistake(error)


@pytest.fixture(scope="module")
def backend(tiny_model):
    return load(str(tiny_model), CPU)


@pytest.fixture(scope="module")
def store(tiny_pairs, backend, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    encode(open_rows(str(tiny_pairs), "train"), backend, into=folder / "store")
    return folder / "store"


@many
@given(st.data())
def test_a_damaged_store_is_read_or_a_mistake(store, backend, tmp_path, data):
    copy = tmp_path / "store"
    shutil.copytree(store, copy, dirs_exist_ok=True)
    if data.draw(st.booleans()):
        name = "pairs-00000.safetensors"
        (copy / name).write_bytes(damaged(data.draw, (store / name).read_bytes()))
        index = json.loads((store / "index.json").read_text())
        index["shards"][0]["bytes"] = (copy / name).stat().st_size
        (copy / "index.json").write_text(json.dumps(index))
    else:
        (copy / "index.json").write_bytes(damaged(data.draw, (store / "index.json").read_bytes()))
    try:
        pairs = open_store(copy, backend=backend)
        pairs.gather(torch.arange(len(pairs)), CPU)
    except UserError as error:
        assert mistake(error)


CONFIGS = ("model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
           "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")  # fmt: skip
numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 2**31, 2**62]) | st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | numbers | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=2),
    max_leaves=4,
)


@few
@given(st.data())
def test_a_checkpoint_whose_configs_say_anything_is_loaded_or_a_mistake(tiny_model, tmp_path, data):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy, dirs_exist_ok=True)
    file = data.draw(st.sampled_from(CONFIGS))
    if data.draw(st.booleans()):
        found = json.loads((copy / file).read_text())
        for key in data.draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=2)):
            found[key] = data.draw(json_values)
        (copy / file).write_text(json.dumps(found))
    else:
        (copy / file).write_bytes(damaged(data.draw, (tiny_model / file).read_bytes()))
    try:
        found = load(str(copy), CPU)
        found.denoiser()
        found.encode_text(["a fox"])
        assert found._parts_fit
    except (UserError, Failure) as error:
        assert on_one_line(str(error)).isprintable()


@few
@given(st.data())
def test_damaged_weights_are_loaded_or_a_mistake(tiny_model, tmp_path, data):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy, dirs_exist_ok=True)
    weights = "unet/diffusion_pytorch_model.safetensors"
    (copy / weights).write_bytes(damaged(data.draw, (tiny_model / weights).read_bytes()))
    try:
        load(str(copy), CPU).denoiser()
    except UserError as error:
        assert mistake(error)
