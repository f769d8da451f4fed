"""Where a whole run's time goes, from imports to tracking: parts that add up, with empty and with warm caches."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.sandbox import EXPERIMENTS, databases, of_checkout, sandbox, temporary_folder
from workbench.benchmarks.stopwatch import stopwatch
from workbench.common.outputs import output_file
from workbench.method.reference import Reference
from workbench.models import fetch
from workbench.studies import single_run
from workbench.training import run as one_run
from workbench.training.config import Config
from workbench.training.diagnostics import BucketDiagnostics, Probe
from workbench.training.experiment_file import load
from workbench.training.preparation import prepare
from workbench.training.preview import Preview

#: In the order of the bar. "the rest" is what no stopwatch saw, so that the parts add up to the whole.
PARTS = (
    "imports",
    "preparing",
    "training steps",
    "candidates of the reference",
    "diagnostics",
    "sample grids",
    "final samples",
    "tracking and the rest",
)
OF_TRAINING = ("training steps", "candidates of the reference")  # what a run is for
#: What every tracked run imports, as module and name in it; the classes of the model's parts come on top.
NEEDED = (("workbench.studies", "single_run"), ("workbench", "tracking"))
FIRST, LATER, TRIAL = "the first run", "a later run", "a trial of the default study"


def parts(options: Options, settings: Mapping[str, Any] | None = None) -> Iterator[Figure]:
    """The share of the default run that is not spent in training, and each part's seconds.

    The first run encodes the pairs and draws the pretrained model's samples; later ones find both in the cache. So does
    a run with the default study's settings, which has fewer pairs a step and other diagnostics.

    Args:
        settings: dotted, of the runs, on top of their own; the device is the options'.
    """
    own_settings = {**(settings or {}), "model.device": str(options.device)}
    config, of_study = (load(file, own_settings) for file in (None, EXPERIMENTS / "default.toml"))
    needed = imports_of(config)
    # All runs are made in this process: what it imports while the first prepares would be missing from the later ones.
    for module, name in needed:
        getattr(import_module(module), name)
    shown: dict[str, Mapping[str, float]] = {}
    with temporary_folder(options.folder) as folder:
        # A cache of its own, which the first run finds empty.
        own = databases(folder) | {"WORKBENCH_CACHE": str(folder / "cache")}
        with sandbox(folder, **own):
            first = [timed_run(config, "run-0", needed)]
            later = [timed_run(config, f"run-{number}", needed) for number in range(1, options.sweeps + 1)]
            prepare(of_study)  # not timed: fills the cache with the samples of its own grid
            trials = [timed_run(of_study, f"trial-{number}", needed) for number in range(options.sweeps)]
    for name, runs in ((FIRST, first), (LATER, later), (TRIAL, trials)):
        outside = [100 * (1 - sum(run[part] for part in OF_TRAINING) / sum(run.values())) for run in runs]
        goal = 15.0 if name == LATER else None
        yield figure("parts", f"{name}, time outside of training", outside, goal, unit="%")
        for part in PARTS:
            yield figure("parts", f"{name}: {part}", [run[part] for run in runs], None, unit="s")
        shown[name] = {part: float(np.median([run[part] for run in runs])) for part in PARTS}
    with output_file(options.folder.parent / "parts.png") as path:
        draw(shown, path)


def imports_of(config: Config) -> list[tuple[str, str]]:
    """What a run of these settings imports, as module and name in it.

    diffusers and transformers load a class's module only when the class is asked for, which takes about as long as all
    else that they do: so the classes of the model's parts are named, and its pipeline, which draws samples.
    """
    model = config.model
    checkpoint = fetch(model.path, model.revision, model.variant, model.vae)
    classes = {(library, name) for library, name in checkpoint.parts.values() if library and name}
    return [*NEEDED, ("diffusers", checkpoint.pipeline), *sorted(classes)]


def import_seconds(needed: Sequence[tuple[str, str]]) -> float:
    """Seconds of a fresh process that imports names from modules, its own start included."""
    code = "\n".join(f"from {module} import {name}" for module, name in needed)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=os.environ | of_checkout(), check=True)
    return time.perf_counter() - began


def timed_run(config: Config, label: str, needed: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Seconds of each of PARTS of one run that is prepared, trained and tracked as `python -m workbench.train` does.

    Args:
        needed: what the run imports, as module and name; this process has it imported already.
    """
    imports = import_seconds(needed)
    with ExitStack() as stack:

        def watched(owner: object, *names: str) -> dict[str, float]:
            return stack.enter_context(stopwatch(owner, *names))

        moves = watched(Reference, "after_step")
        session = watched(one_run._Session, "report_start", "report", "report_end")
        grids, measuring = watched(Preview, "draw"), watched(BucketDiagnostics, "__call__")
        probes, training = watched(Probe, "__call__"), watched(single_run, "execute")
        built = watched(one_run, "build")
        began = time.perf_counter()
        prepared = prepare(config)
        preparing = time.perf_counter() - began
        # The probe's own passes while it is prepared belong there.
        probes["__call__"] = measuring["__call__"] = 0.0
        one = single_run.SingleRun(config, prepared, label, None, lambda: False, None, goes_on=False, again="")
        began = time.perf_counter()
        # What a run prints at its end, its metrics and a link, is no line of the benchmark's table.
        with redirect_stdout(io.StringIO()):
            single_run.tracked(one, None)
        whole = time.perf_counter() - began
    candidates = moves["after_step"]
    diagnostics = measuring["__call__"] + max(0.0, probes["__call__"] - candidates)
    around = sum(session.values()) + built["build"]
    seconds = {
        "imports": imports,
        "preparing": preparing,
        "training steps": training["execute"] - around - candidates,
        "candidates of the reference": candidates,
        "diagnostics": diagnostics,
        "sample grids": grids["draw"],
        "final samples": session["report_end"],
    }
    return seconds | {"tracking and the rest": imports + preparing + whole - sum(seconds.values())}


def draw(shown: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A bar a kind of run, of its parts in seconds.

    Args:
        shown: kind of run -> part -> seconds.
    """
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 1.2 + 0.55 * len(shown)), layout="constrained")
    axes = canvas.add_subplot()
    names: Sequence[str] = list(shown)
    left = np.zeros(len(names))
    for place, part in enumerate(PARTS):
        seconds = np.array([shown[name][part] for name in names])
        axes.barh(names, seconds, left=left, label=part, color=f"C{place}", edgecolor="white")
        for row, (width, begin) in enumerate(zip(seconds, left, strict=True)):
            if width > 0.05 * max(sum(one.values()) for one in shown.values()):
                axes.text(begin + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
        left += seconds
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    canvas.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    canvas.savefig(path, dpi=150, format="png")
