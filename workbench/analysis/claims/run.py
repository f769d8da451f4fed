"""Checking the claims: run the studies that they need, judge them, write the table and track it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from workbench import tracking
from workbench.analysis.claims import checks, regime, rules, table, verdicts
from workbench.analysis.claims.evidence import Evidence
from workbench.analysis.claims.forest import forest
from workbench.common.command_line import default_workers
from workbench.common.outputs import output_file, require_own
from workbench.common.paths import shipped
from workbench.common.validation import study_name, writable_folder
from workbench.studies import lifecycle, tuning
from workbench.studies.experiment import Experiment, without
from workbench.tracking import ui
from workbench.tracking.study_runs import StudyId
from workbench.training.config import merge
from workbench.training.experiment_file import parse_override, read

DEFAULT = shipped("experiments/claims.toml")
#: Settings of a check that takes minutes.
QUICK: dict[str, Any] = {
    "sweep.seeds": [0, 1],
    "train.steps": 32,
    "evaluation.steps": 8,
    "evaluation.seeds": 1,
    "diagnostics.interval": 8,
    "diagnostics.pairs": 100,
    "diagnostics.draws": 1,
}


class Outcome(NamedTuple):
    """What the person sees at the end.

    Attributes:
        study: name of the study whose arms were compared.
        text: the verdicts and their effects, for a terminal.
        files: the table as Markdown, and as JSON; the regime's numbers as JSON.
        is_new: whether this run changed them.
        link: the study in MLflow's user interface.
    """

    study: str
    text: str
    files: tuple[Path, ...]
    is_new: bool
    link: str


def check_claims(
    experiment: Path | None,
    overrides: Sequence[str],
    *,
    quick: bool,
    study: str | None,
    workers: int | None,
    out: Path,
    say: Callable[[str], object],
) -> Outcome:
    """Run what is not there yet of the studies that the claims rest on, judge all claims, write and track the table.

    Args:
        experiment: file with the arms; None = the shipped one.
        overrides: texts KEY=VALUE.
        quick: few seeds and steps, no tuning.
        study: None = the file's name, with -quick where it is.
        workers: processes; None = as many as suit the machine.
        out: gets a folder of the study's name.
        say: is given a line of progress at a time.
    Raises:
        UserError: a setting is wrong, or a study of that name was made with others.
    """
    usual = experiment.stem if experiment else "claims"
    name = study_name(study or (f"{usual}-quick" if quick else usual))
    declared = _declared(experiment or DEFAULT, overrides, quick)  # first: a mistake in it makes no folder
    folder = writable_folder("--out", out / name)
    # Asked before the studies run, which takes an hour.
    require_own(folder, "claims.md", "claims.json", "claims.png", "regime.json")
    candidates, arms = len(tuning.candidates(declared)), len(declared.sweep.arms)
    say(f"{candidates} runs to tune the arms, then {len(declared.arms)} runs of {arms} arms; progress below.")
    lifecycle.run_study(declared, name, workers or default_workers(declared.config.model.device))
    own = lifecycle.identity(name)
    beside = replace(own, name=f"{name}-checks")
    checks.run_checks(declared, beside)
    rows = judge(own, beside)
    findings = lifecycle.search_findings(declared, name) if candidates else None
    measures = regime.of_study(name, findings.on_edge if findings else None)
    files, is_new = _write(folder, rows, measures, findings, declared)
    # Otherwise a second run would change the study's artifacts though nothing is new.
    if is_new:
        for path in files:
            tracking.attach(own.address, path, "claims")
    link = tracking.ui_link(tracking.connect(), own.address)
    return Outcome(name, table.plain(rows, measures), files, is_new, link)


def _declared(experiment: Path, overrides: Sequence[str], quick: bool) -> Experiment:
    settings = read(experiment) | {"sweep.trials": 0}  # the arms alone
    if quick:
        settings = merge(without(settings, "sweep.tuning"), QUICK)
    return Experiment.resolve(merge(settings, dict(parse_override(text) for text in overrides)))


def judge(study: StudyId, beside: StudyId) -> list[dict[str, Any]]:
    """The claims with their effects, verdicts and links, from the tracked runs of a study and of its checks.

    Args:
        beside: the study of the checks that need no arms.

    Returns:
        As `verdicts.judge`, each with a `link` to the runs that it rests on, which are tagged with its number, and with
        the `steps` of the study's runs: one number, unless they differ.
    """
    runs, client = tracking.load_runs(study.address), tracking.connect()
    evidence = Evidence(
        runs,
        tracking.load_history(runs),
        tracking.load_samples(runs),
        tracking.load_runs(beside.address),
        tracking.load_lost(study.address),
    )
    rows = verdicts.judge(rules.CLAIMS, evidence)
    links = ui.claim_links(client, study.address, {row["number"]: row["arms"] for row in rows if row["arms"]})
    steps = sorted({int(count) for count in runs["train.steps"].drop_nulls()})
    for row in rows:
        row["steps"] = steps
        row["link"] = links.get(row["number"]) or tracking.ui_link(client, beside.address)
    return rows


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    measures: list[regime.Measure],
    findings: tuning.Findings | None,
    experiment: Experiment,
) -> tuple[tuple[Path, ...], bool]:
    """Write claims.md, claims.json, regime.json and the figure where they change; the files, and whether one did."""
    numbers = [one.as_dict() for one in measures]
    contents = {
        folder / "claims.md": table.markdown(rows, measures, findings, experiment),
        folder / "claims.json": json.dumps(rows, indent=2, allow_nan=False) + "\n",
        folder / "regime.json": json.dumps(numbers, indent=2, allow_nan=False) + "\n",
    }
    before = {path: path.read_text(encoding="utf-8") for path in contents if path.is_file()}
    changed = {path: text for path, text in contents.items() if before.get(path) != text}
    for path, text in changed.items():
        with output_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    figure = folder / "claims.png"
    if changed or not figure.is_file():
        with output_file(figure) as partial:
            forest(rows).savefig(partial, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return (*contents, figure), bool(changed)
