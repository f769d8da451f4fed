"""Names and places that lead somewhere else or nowhere, and what an evaluation is told wrongly."""

from collections.abc import Callable

import torch

from tests.support.bad_checkpoints import Harm
from tests.support.bad_inputs import Bad, Place

LONG = "x" * 5000
#: What must not become a file's or folder's name.
NAMES = {
    "above the folder": "../x",
    "at the root": "/tmp/x",
    "with a slash": "a/b",
    "of two points": "..",
    "with a line in it": "a\nError: b",
    "with an escape sequence": "a\x1b[2J",
    "of 5000 characters": LONG,
    "of nothing": "",
    "with a NUL": "a\0b",
    "with a quote": "a' OR 1=1 --",
    "that looks like an option": "-x",
    "of bytes that are no text": "\udcff",
}


def _written(place: Place) -> None:
    """Somebody's files."""
    (place.folder / "file").write_text("years of work")
    (place.folder / "full").mkdir()
    (place.folder / "full" / "thesis.txt").write_text("years of work")
    (place.folder / "link").symlink_to("full")
    (place.folder / "loop").symlink_to("loop")


def _train(*arguments: str) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        _written(place)
        return ["train", *place.given(), *arguments]

    return make


def _evaluate(*arguments: str, model: bool = True) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        _written(place)
        sources = {"MODEL": str(place.settings["model.path"]), "PROMPTS": str(place.settings["data.prompts"])}
        found = [sources.get(a, a) for a in arguments]
        return ["evaluate", *(["--model", f"a={sources['MODEL']}"] if model else []), "--output", "out", *found]

    return make


def _command(*arguments: str) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        _written(place)
        return list(arguments)

    return make


def _settings(content: str) -> Callable[[Place], list[str]]:
    """An evaluation's folder whose settings say this."""

    def make(place: Place) -> list[str]:
        (place.folder / "out").mkdir()
        (place.folder / "out" / "settings.json").write_text(content)
        return _evaluate()(place)

    return make


def _weights_alone(place: Place) -> list[str]:
    """Trained adapters that are a pickle by another name."""
    folder = place.folder / "lora"
    folder.mkdir()
    torch.save({"harm": Harm(place.folder)}, folder / "pytorch_lora_weights.safetensors")
    return ["evaluate", "--model", "a=lora", "--base", str(place.settings["model.path"]), "--output", "out"]


def _encode(output: str) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        _written(place)
        return ["encode", "--split", "train", "--output", output, *place.given()]

    return make


#: Where pairs cannot be encoded to: the folder, what the line must name, and the code, 1 where it may be the disk.
STORES = {
    "a file": ("file", "file/train: cannot be written", 1),
    "where nothing can be made": ("/proc/x", "/proc/x/train: cannot be written", 1),
    "a folder of 5000 characters": (LONG, "xxx/train: no folder has such a name", 2),
}
NO = "use up to 100 letters, digits"
PLACES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "output: a file": (_train("--output", "file"), "--output file: "),
    "output: somebody's folder": (_train("--output", "full"), "--output full: not an empty folder"),
    "output: a link to somebody's folder": (_train("--output", "link"), "--output link: not an empty folder"),
    "output: a link to itself": (_train("--output", "loop"), "--output loop: "),
    "output: below a file": (_train("--output", "file/x"), "--output file/x: "),
    "output: where nothing can be made": (_train("--output", "/proc/x"), "--output /proc/x: cannot be written"),
    "output: of 5000 characters": (_train("--output", LONG), "--output 'xxx"),
    "resume: without a name": (_train("--resume"), "--resume: say with --name which run"),
    "encoding: no workers": (lambda p: ["encode", "--workers", "0", *p.given()], "--workers"),
    "encoding: too few to estimate": (lambda p: ["encode", "--estimate", "1", *p.given()], "--estimate"),
    "study: no trials": (_command("sweep", "--trials", "0"), "--trials"),
    "study: a word for a sampler's number": (
        _command("sweep", "--set", 'sweep.sampler_options={n_startup_trials="x"}'),
        "sweep.sampler = 'TPESampler' with {",
    ),
    "study: too few at once for a sampler": (
        _command("sweep", "--set", "sweep.sampler=NSGAIISampler", "--set", "sweep.sampler_options={population_size=1}"),
        "sweep.sampler_options = {'population_size': 1}",
    ),
    "study: no such file": (_command("sweep", "nowhere.toml"), "nowhere"),
    "study: a word for workers": (_command("sweep", "--workers", "many"), "--workers"),
    "report: a file": (_command("report", "--study", "made", "--out", "file"), "--out file"),
    "report: below a file": (_command("report", "--study", "made", "--out", "file/x"), "--out file/x"),
    "report: where nothing can be made": (_command("report", "--study", "made", "--out", "/proc/x"), "--out /proc/x"),
    "report: an unknown study": (_command("report", "--study", "unknown"), "study 'unknown': not found"),
    "report: a study above": (_command("report", "--study", "../x"), "--study '../x'"),
    "report: a notebook above": (_command("report", "--study", "made", "--notebook", "../x"), "--notebook ../x"),
    "report: no parameter": (_command("report", "--study", "made", "-p", "x"), "x: expected KEY=VALUE"),
    "report: an unknown parameter": (_command("report", "--study", "made", "-p", "smooting=1"), "--parameter smooting"),
    "report: its own parameter": (_command("report", "--study", "made", "-p", "out=/tmp"), "--parameter out"),
    "claims: a file": (_command("claims", "--quick", "--out", "file"), "--out file"),
    "claims: a study above": (_command("claims", "--study", "../x"), "--study '../x'"),
    "export: a file": (_command("study", "export", "made", "--out", "file"), "--out file"),
    "export: a study above": (_command("study", "export", "../x"), "--study '../x'"),
    "status: a study above": (_command("study", "status", "../x"), "--study '../x'"),
    "status: an unknown study": (_command("study", "status", "unknown"), "unknown"),
    "evaluation: no model": (_evaluate(model=False), "--model: give at least one"),
    "evaluation: a model without a name": (_evaluate("--model", "x", model=False), "--model x: expected NAME=SOURCE"),
    "evaluation: a model's name above": (_evaluate("--model", "../x=embedded"), "--model ../x=embedded"),
    "evaluation: a model's name with a line in it": (_evaluate("--model", "a\nb=embedded"), r"--model a\nb=embedded"),
    "evaluation: a model's name of 5000 characters": (_evaluate("--model", f"{LONG}=embedded"), "--model xxx"),
    "evaluation: a model twice": (_evaluate("--model", "a=embedded"), "'a' is there twice"),
    "evaluation: a model that is nowhere": (_evaluate("--model", "b=nowhere"), "--model b=nowhere"),
    "evaluation: a model of 5000 characters": (_evaluate("--model", f"b={LONG}"), "--model b=xxx"),
    "evaluation: a model with a NUL": (_evaluate("--model", "b=a\0b"), r"--model b=a\x00b"),
    "evaluation: a run that is none": (_evaluate("--model", "b=runs:/../../x"), "runs:/../../x: no such run"),
    "evaluation: a study that is none": (_evaluate("--model", "study:../x"), "study '../x'"),
    "evaluation: adapters that are a pickle": (_weights_alone, "pytorch_lora_weights.safetensors cannot be loaded"),
    "evaluation: ours that is none": (_evaluate("--ours", "../x"), "--ours ../x: not among the models a"),
    "evaluation: prompts by a name above": (_evaluate("--prompts", "../x=embedded"), "--prompts ../x=embedded"),
    "evaluation: prompts that are nowhere": (_evaluate("--prompts", "nowhere.txt"), "--prompts nowhere.txt"),
    "evaluation: prompts of 5000 characters": (_evaluate("--prompts", f"{LONG}.txt"), "--prompts xxx"),
    "evaluation: prompts by a name, of 5000 characters": (_evaluate("--prompts", f"p={LONG}"), "--prompts xxx"),
    "evaluation: a scorer of 5000 characters": (_evaluate("--scorer", f"clip={LONG}"), "--scorer clip=xxx"),
    "evaluation: prompts that are devices": (_evaluate("--prompts", "/dev/zero"), "--prompts /dev/zero"),
    "evaluation: a scorer that is none": (_evaluate("--scorer", "os.system"), "--scorer 'os.system'"),
    "evaluation: a scorer that is nowhere": (_evaluate("--scorer", "clip=./nowhere"), "--scorer clip=./nowhere"),
    "evaluation: a scorer in somebody's folder": (_evaluate("--scorer", "clip=full"), "--scorer clip=full: neither"),
    "evaluation: guidance that is no number": (_evaluate("--guidance", "nan"), "--guidance"),
    "evaluation: guidance without end": (_evaluate("--guidance", "inf"), "--guidance"),
    "evaluation: steps beyond the model's": (_evaluate("--steps", "5000"), "5000 steps"),
    "evaluation: a resolution between": (_evaluate("--resolution", "33"), "model.resolution = 33"),
    "evaluation: a resolution beyond": (_evaluate("--resolution", "10000000"), "resolution"),
    "evaluation: a variant above": (_evaluate("--variant", "../x"), "variant '../x'"),
    "evaluation: a device that is none": (_evaluate("--device", "toaster"), "'toaster'"),
    "evaluation: a name with a line in it": (_evaluate("--name", "a\nb"), r"--name 'a\nb'"),
    "evaluation: a name of 5000 characters": (_evaluate("--name", LONG), "--name 'xxx"),
    "evaluation: a file for its folder": (_evaluate("--output", "file"), "--output file"),
    "evaluation: somebody's folder": (_evaluate("--output", "full"), "--output full: neither empty nor"),
    "evaluation: a folder of 5000 characters": (_evaluate("--output", LONG), "--output xxx"),
    "evaluation: below a file": (_evaluate("--output", "file/x"), "--output file/x"),
    "evaluation: where nothing can be made": (_evaluate("--output", "/proc/x"), "--output /proc/x"),
    "evaluation: settings that are no JSON": (_settings("{"), "--output out: its settings.json is damaged"),
    "evaluation: settings that are a list": (_settings("[]"), "--output out: its settings.json is damaged"),
    "evaluation: settings of words": (
        _settings('{"sampling": 1, "prompts": 2, "models": 3, "scorers": 4}'),
        "--output out: its settings.json is damaged",
    ),
    "evaluation: settings of nothing": (_settings("{}"), "--output out: its settings.json is damaged"),
}


def cases() -> list[Bad]:
    """All of them."""
    found = [Bad(name, make, (says,)) for name, (make, says) in PLACES.items()]
    found += [Bad(f"encoding: {name}", _encode(output), (says,), code) for name, (output, says, code) in STORES.items()]
    for name, text in NAMES.items():
        if text:
            found.append(Bad(f"run's name: {name}", _train("--name", text), ("--name", NO)))
        for command in ("train", "sweep", "claims"):
            if text or command == "train":
                found.append(Bad(f"{command}'s study: {name}", _command(command, "--study", text), ("--study", NO)))
    return found
