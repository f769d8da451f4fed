"""What a person is told of the best trial's folder."""

import re
from pathlib import Path

from workbench.studies.best import how_to_draw
from workbench.training.config import resolve


def test_lora_weights_are_loaded_into_a_model_that_is_there_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = how_to_draw(Path("best"), resolve({"lora.rank": 4}))
    base = re.search(r'from_pretrained\("(.*)"\)', told)[1]
    assert (Path(base) / "model_index.json").is_file() and 'load_lora_weights("best")' in told
    settings = {"lora.rank": 4, "model.path": "a/b", "model.revision": "main", "model.variant": "fp16"}
    assert 'from_pretrained("a/b", revision="main", variant="fp16")' in how_to_draw(Path("best"), resolve(settings))
    assert 'from_pretrained("best")' in how_to_draw(Path("best"), resolve({}))
