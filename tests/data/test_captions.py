import torch
from torch import Generator

from workbench.data.captions import drop_captions, empty_caption
from workbench.data.encoding import encode
from workbench.data.pairs import Batch
from workbench.data.rows import open_rows
from workbench.models import load

CPU = torch.device("cpu")
EMPTY = {"text": torch.full((1, 3, 2), -1.0)}


def batches(count=8, size=4):
    for number in range(count):
        yield Batch(torch.zeros(size, 1, 2, 2), torch.zeros(size, 1, 2, 2), {"text": torch.full((size, 3, 2), number)})


def dropped(share, count=8, skip=0, size=4):
    source = list(batches(count, size))[skip:]
    generator = Generator().manual_seed(3)
    found = drop_captions(iter(source), EMPTY, share=share, size=size, generator=generator, skip=skip)
    return torch.stack([batch.condition["text"] for batch in found])


def test_about_the_share_of_captions_is_empty_and_the_others_are_untouched():
    text = dropped(0.2, count=500)
    empty = (text == -1).all((2, 3))
    assert 0.17 < empty.float().mean() < 0.23
    expected = torch.arange(500.0).view(-1, 1, 1, 1).expand_as(text)
    assert torch.equal(text[~empty], expected[~empty])
    assert (dropped(0.0) >= 0).all() and (dropped(1.0) == -1).all()


def test_a_run_that_goes_on_drops_the_captions_that_it_would_have_dropped():
    assert torch.equal(dropped(0.5)[5:], dropped(0.5, skip=5))


def test_the_empty_caption_is_encoded_once(tiny_model, workplace, monkeypatch):
    backend = load(str(tiny_model), CPU)
    first = empty_caption(backend)
    torch.testing.assert_close(first["text"], backend.encode_text([""])["text"])
    monkeypatch.setattr(type(backend), "encode_text", None)
    assert torch.equal(empty_caption(load(str(tiny_model), CPU))["text"], first["text"])


def test_what_a_pair_is_told_takes_the_place_of_what_is_stored(tiny_model, tiny_pairs, workplace):
    pairs = encode(open_rows(str(tiny_pairs), "train"), load(str(tiny_model), CPU))
    told = pairs.with_condition({"time_ids": torch.tensor([64.0, 64, 0, 0])})
    batch = told.gather(torch.tensor([3, 1]), CPU)
    assert batch.condition["time_ids"].tolist() == [[64.0, 64, 0, 0]] * 2
    assert torch.equal(batch.condition["text"], pairs.gather(torch.tensor([3, 1]), CPU).condition["text"])
    assert told.digest != pairs.digest and pairs.with_condition({}) is pairs
