"""Experiment files, overrides and options that are wrong."""

from tests.support.bad_inputs import Bad, Place

DEEP = 5_000
LONG = "x" * 10_000


def _written(content: str | bytes, command: str = "train"):
    def make(place: Place) -> list[str]:
        data = content if isinstance(content, bytes) else content.encode()
        (place.folder / "e.toml").write_bytes(data)
        return [command, "e.toml"]

    return make


def _folder(place: Place) -> list[str]:
    (place.folder / "e.toml").mkdir()
    return ["train", "e.toml"]


def _unreadable(place: Place) -> list[str]:
    (place.folder / "e.toml").symlink_to("/proc/self/mem")
    return ["train", "e.toml"]


def _loop(place: Place) -> list[str]:
    (place.folder / "e.toml").symlink_to("e.toml")
    return ["train", "e.toml"]


#: Not an experiment file at all: what is written, and what the line names.
FILES: dict[str, tuple[str | bytes, str]] = {
    "not TOML": ("reference = [", "not valid TOML"),
    "JSON": ('{"seed": 1}', "not valid TOML"),
    "UTF-16": ("seed = 1\n".encode("utf-16"), "not valid TOML"),
    "Latin-1": ('[model]\npath = "é"\n'.encode("latin-1"), "not valid TOML"),
    "NUL": ("seed = 1\0", "not valid TOML"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not valid TOML"),
    "arrays in arrays": ("seed = " + "[" * DEEP, "nested too deeply"),
    "tables in tables": ("seed = " + "{a=" * DEEP, "nested too deeply"),
    "a name of many parts": (f"a{'.a' * DEEP} = 1", "nested"),
    "a header of many parts": (f"[a{'.a' * DEEP}]\nb = 1", "nested"),
    "a key twice": ("seed = 1\nseed = 2", "not valid TOML"),
    "a table twice": ("[train]\nsteps = 1\n[train]\nlr = 1.0", "not valid TOML"),
    "a setting with a setting in it": ("[train]\nsteps = 1\n[train.steps]\nx = 1", "not valid TOML"),
    "a setting by two names": ('"train.steps" = 1\n[train]\nsteps = 2', "train.steps"),
    "a number of 5000 digits": ("seed = " + "9" * 5000, "not valid TOML"),
    "a date that is none": ("seed = 2020-13-45", "not valid TOML"),
}
#: Experiment files with something impossible in them.
SETTINGS: dict[str, tuple[str, str]] = {
    "a word for a number": ('seed = "one"', "seed = 'one'"),
    "a number below zero": ("seed = -1", "seed = -1"),
    "a fraction": ("seed = 1.5", "seed = 1.5"),
    "a truth value for a number": ("seed = true", "seed = True"),
    "a truth value for a fraction": ("[train]\nlr = true", "train.lr = True"),
    "a number for a truth value": ("[train]\nkeep = 3", "train.keep = 3"),
    "a date": ("seed = 2020-01-01", "seed = "),
    "a time for a path": ("[model]\npath = 07:32:00", "model.path = "),
    "a list for a number": ("seed = [1]", "seed = [1]"),
    "a table for a number": ("[train]\nsteps = { a = 1 }", "train.steps"),
    "a number for a table": ("train = 3", "train = 3"),
    "a word for a table": ('model = "embedded"', "model = 'embedded'"),
    "a list of tables": ("[[train]]\nsteps = 1", "train = [{'steps': 1}]"),
    "a number for a path": ("[model]\npath = 3", "model.path = 3"),
    "three betas": ("[train]\nbetas = [0.9, 0.9, 0.9]", "train.betas"),
    "a beta of one": ("[train]\nbetas = [0.9, 1.0]", "train.betas.1 = 1.0"),
    "numbers for names": ("[lora]\nrank = 4\ntargets = [1, 2]", "lora.targets.0 = 1"),
    "infinity": ("[train]\nlr = inf", "train.lr = inf"),
    "not a number": ("[reference]\ndelta = nan", "reference.delta = nan"),
    "a seed that no generator takes": (f"seed = {10**30}", "seed = 1000"),
    "more steps than can be counted": (f"[train]\nsteps = {10**19}", "train.steps = 1000"),
    "a fraction that is too large": ("[train]\nlr = 1" + "0" * 400, "train.lr = 1000"),
    "more pictures than there is room for": (f"[evaluation]\nseeds = {10**9}", "evaluation.seeds = 1000000000"),
    "more buckets than timesteps": (f"[diagnostics]\nbuckets = {10**9}", "diagnostics.buckets = 1000000000"),
    "adapters larger than the model": (f"[lora]\nrank = {10**9}", "lora.rank = 1000000000"),
    "pictures too large to decode": ("[model]\nresolution = 1000000", "model.resolution = 1000000"),
    "an unknown table": ("[trains]\nsteps = 1", "trains: unknown setting"),
    "an unknown setting": ("[train]\nstep = 1", "did you mean train.steps?"),
    "an unknown choice": ('[reference]\npolicy = "thaw"', "reference.policy = 'thaw'"),
    "a list for a choice": ('[objective]\nloss = ["dpo"]', "objective.loss = ['dpo']"),
    "a choice without its name": ("objective = 3", "objective = 3"),
    "what a choice does not take": (
        '[reference]\npolicy = "frozen"\ndelta = 0.1',
        "reference.delta: unknown setting (not a setting of this policy)",
    ),
    "an empty key": ('"" = 1', "'': unknown setting"),
    "an empty part of a key": ('"train..steps" = 1', "train.: unknown setting"),
    "a key with an escape sequence": ('"\\u001b[2Jseed" = 1', r"\x1b[2Jseed: unknown setting"),
    "a key over several lines": ('"a\\nError: b" = 1', r"a\nError: b: unknown setting"),
    "a path of 10,000 characters": (f'[model]\npath = "{LONG}"', "model.path = 'xxx"),
    "a path over two lines": ('[data]\ntrain = "a\\nb"', r"data.train = 'a\nb'"),
    "a path with a NUL": ('[data]\nprompts = "a\\u0000b"', r"data.prompts = 'a\x00b'"),
    "a prompt file's name of 10,000 characters": (f'[data]\nprompts = "{LONG}"', "data.prompts = 'xxx"),
    "a device of 10,000 characters": (f'[model]\ndevice = "{LONG}"', "model.device = 'xxx"),
    "a key of 10,000 characters": (f"{LONG} = 1", "xxx"),
    "a device that is none": ('[model]\ndevice = "toaster"', "model.device = 'toaster'"),
    "adapters' settings without adapters": ("[lora]\nalpha = 3.0", "lora"),
}
#: Studies that are impossible.
STUDIES: dict[str, tuple[str, str]] = {
    "a number for the study": ("sweep = 3", "sweep = 3"),
    "a number for the objective": ("[sweep]\nobjective = 3", "sweep.objective = 3"),
    "a list of numbers for the objective": ("[sweep]\nobjective = [3]", "sweep.objective = [3]"),
    "a direction that is none": ('[sweep]\ndirection = "up"', "sweep.direction = 'up'"),
    "a sampler that is a module": ('[sweep]\nsampler = "os"', "sweep.sampler = 'os'"),
    "a sampler that is private": ('[sweep]\nsampler = "__builtins__"', "sweep.sampler = '__builtins__'"),
    "a sampler's unknown option": ("[sweep]\nsampler_options = { x = 1 }", "sweep.sampler_options"),
    "a seed twice": ("[sweep]\nseeds = [1, 1]", "sweep.seeds = [1, 1]"),
    "a seed that the sampler does not take": (f"[sweep]\nseed = {2**40}", f"sweep.seed = {2**40}"),
    "no arms and no trials": ("[sweep]\ntrials = 0", "sweep.trials = 0"),
    "a number for the arms": ("[sweep]\narms = 3", "sweep.arms = 3"),
    "a number for an arm": ("[sweep.arms]\na = 3", "sweep.arms.a = 3"),
    "an arm's unknown setting": ('[sweep.arms]\na = { "train.stepz" = 3 }', "sweep.arms.a: train.stepz: unknown"),
    "an arm's impossible setting": ('[sweep.arms]\na = { "train.steps" = 0 }', "sweep.arms.a: train.steps = 0"),
    "an arm that sets the study": ('[sweep.arms]\na = { "sweep.trials" = 3 }', "sweep.arms.a: sweep.trials"),
    "an arm like none": ('[sweep.arms]\na = { like = "b" }', "sweep.arms.a.like = 'b'"),
    "an arm like a list": ('[sweep.arms]\na = { like = ["b"] }', "like = ['b']: expected the name of an arm"),
    "an arm times a number": ("[sweep.arms]\na = { times = 3 }", "times = 3: expected a table"),
    "an arm times a word": ('[sweep.arms]\na = { times = { "train.lr" = "x" } }', "train.lr = 3e-06 times 'x'"),
    "an arm's name that leaves its folder": ('[sweep.arms]\n"../../evil" = {}', "sweep.arms = '../../evil'"),
    "an arm's name with a slash": ('[sweep.arms]\n"a/b" = {}', "sweep.arms = 'a/b'"),
    "an arm's name over two lines": ('[sweep.arms]\n"a\\nError: b" = {}', r"sweep.arms = 'a\nError: b'"),
    "an arm's name of 10,000 characters": (f"[sweep.arms]\n{LONG} = {{}}", "sweep.arms = 'xxx"),
    "an arm without a name": ('[sweep.arms]\n"" = {}', "sweep.arms = ''"),
    "a number for a dimension": ("[sweep.space]\nseed = 3", "sweep.space.seed = 3"),
    "a dimension that is no setting": (
        '[sweep.space]\n"train.stepz" = { type = "IntDistribution", low = 1, high = 2 }',
        "sweep.space.train.stepz",
    ),
    "a distribution that is none": ('[sweep.space]\nseed = { type = "os.system" }', "seed.type = 'os.system'"),
    "a list for a distribution": ("[sweep.space]\nseed = { type = [1] }", "sweep.space.seed.type = [1]"),
    "a dimension without bounds": ('[sweep.space]\nseed = { type = "IntDistribution" }', "sweep.space.seed"),
    "bounds that are words": (
        '[sweep.space]\nseed = { type = "IntDistribution", low = "a", high = "b" }',
        "sweep.space.seed",
    ),
    "bounds the wrong way round": (
        '[sweep.space]\n"train.lr" = { type = "FloatDistribution", low = 1.0, high = 0.5 }',
        "sweep.space.train.lr",
    ),
    "a bound that is infinite": (
        '[sweep.space]\n"train.lr" = { type = "FloatDistribution", low = 0.1, high = inf }',
        "train.lr = inf",
    ),
    "a step of nothing": (
        '[sweep.space]\nseed = { type = "IntDistribution", low = 1, high = 3, step = 0 }',
        "sweep.space.seed",
    ),
    "no choices": ('[sweep.space]\nseed = { type = "CategoricalDistribution", choices = [] }', "sweep.space.seed"),
    "choices that are lists": (
        '[sweep.space]\n"reference.policy" = { type = "CategoricalDistribution", choices = [["frozen"]] }',
        "sweep.space.reference.policy",
    ),
    "a number for the choices": (
        '[sweep.space]\nseed = { type = "CategoricalDistribution", choices = 3 }',
        "sweep.space.seed",
    ),
    "pruning by a word": ('[sweep]\nprune = { above = "high" }', "sweep.prune.above = 'high'"),
    "tuning by words": ('[sweep.tuning]\nfactors = { "train.lr" = ["x"] }', "sweep.tuning.factors"),
    "tuning by nothing": (
        '[sweep.arms]\na = {}\n[sweep.tuning]\nfactors = { "train.lr" = [] }',
        "sweep.tuning.factors",
    ),
    "tuning what is no number": (
        '[sweep.arms]\na = {}\n[sweep.tuning]\nfactors = { "model.path" = [2.0] }',
        "model.path = 'embedded' times 2.0",
    ),
}
OVERRIDES: dict[str, tuple[str, str]] = {
    "no equals sign": ("train.steps", "--set train.steps: expected KEY=VALUE"),
    "nothing": ("", "expected KEY=VALUE"),
    "no key": ("=1", "--set =1: expected KEY=VALUE"),
    "a blank key": (" =1", "expected KEY=VALUE"),
    "no value": ("train.steps=", "train.steps = ''"),
    "an empty part": ("train..steps=1", "train.: unknown setting"),
    "a part too many": ("train.steps.more=1", "train.steps"),
    "a look-alike": ("sееd=1", "sееd: unknown setting"),
    "a full-width digit": ("train.lr=１e", "train.lr = '１e'"),
    "an unclosed bracket": ("train.betas=[0.9", "train.betas = '[0.9'"),
    "brackets without end": ("train.betas=" + "[" * DEEP, "train.betas = '[[["),
    "a second line": ("train.steps=4\nseed=1", r"train.steps = '4\nseed=1'"),
    "a second table": ("train.steps=4\n[evaluation]\nseeds = 0", "train.steps = '4"),
    "a name of many parts": (f"sweep.arms{'.a' * DEEP}=1", "nested"),
    "bytes that are no text": ("model.path=\udcff\udcfe", r"model.path = '\udcff\udcfe'"),
    "an escape sequence": ("model.dtype=\x1b[31mfloat", r"model.dtype = '\x1b[31mfloat'"),
    "5000 digits": ("seed=" + "9" * 5000, "seed = "),
    "a table for a section": ("train={steps=0}", "train.steps = 0"),
}


def cases() -> list[Bad]:
    """All of them."""
    found = [Bad(f"experiment: {name}", _written(text), ("e.toml", says)) for name, (text, says) in FILES.items()]
    found += [
        Bad(
            "override: an arm's unknown setting",
            lambda _: ["sweep", "--set", "sweep.arms.x.y=1"],
            ("sweep.arms.x: y:",),
        ),
        Bad(
            "override: an arm's table",
            lambda _: ["sweep", "--set", "sweep.arms.x.train.lr=0"],
            ("sweep.arms.x: train.lr = 0",),
        ),
        Bad("experiment: a folder", _folder, ("experiment e.toml: no such file",)),
        Bad("experiment: unreadable", _unreadable, ("experiment e.toml: cannot be read",)),
        Bad("experiment: a link to itself", _loop, ("experiment e.toml: no such file",)),
    ]
    found += [Bad(f"settings: {name}", _written(text), (says,)) for name, (text, says) in SETTINGS.items()]
    found += [Bad(f"study: {name}", _written(text, "sweep"), (says,)) for name, (text, says) in STUDIES.items()]
    found += [
        Bad(f"override: {name}", lambda _, text=text: ["train", "--set", text], (says,))
        for name, (text, says) in OVERRIDES.items()
    ]
    return found
