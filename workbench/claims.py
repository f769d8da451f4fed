"""`python -m workbench.claims`: every claim of the paper, measured, with an interval and a verdict."""

import json
from pathlib import Path
from typing import Any

import click

from workbench.common.command_line import (
    command,
    default_workers,
    experiment_argument,
    one_process,
    set_option,
    silence_transformers,
    this_python,
)
from workbench.common.paths import shipped
from workbench.common.validation import study_name, writable_folder
from workbench.training.settings_option import settings_option

DEFAULT = shipped("experiments/claims.toml")
QUICK: dict[str, Any] = {
    "sweep.seeds": [0, 1],
    "train.steps": 32,
    "evaluation.steps": 8,
    "evaluation.seeds": 1,
    "diagnostics.interval": 8,
    "diagnostics.pairs": 100,
    "diagnostics.draws": 1,
}


@experiment_argument
@click.option("--quick", is_flag=True, help="2 seeds, 32 steps, no tuning: effects, but no verdicts.")
@click.option("--study", metavar="NAME", help="The study's name. Default: claims, or claims-quick.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes. Default: the CPU's cores, 1 on a GPU.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
@set_option
@settings_option
def main(
    experiment: Path | None,
    quick: bool,
    study: str | None,
    workers: int | None,
    out: Path,
    overrides: tuple[str, ...],
) -> None:
    """Check the paper's claims: run the arms that they need, print the table, write it under OUT/STUDY/.

    Three studies, each resumable: STUDY-tuning finds every arm's learning rate and beta, STUDY runs the arms with
    every seed, STUDY-checks those that need no arms. What is there is not run again: Ctrl-C and the same command
    goes on, and a second run only judges. The rules are in workbench/analysis/claims/rules.py, the arms in
    experiments/claims.toml. On two CPU cores the default takes about forty minutes, --quick about six.

    \b
    Examples:
      python -m workbench.claims
      python -m workbench.claims --quick
      python -m workbench.claims --workers 8
    """
    name = study_name(study or ("claims-quick" if quick else "claims"))
    one_process()
    from workbench import tracking
    from workbench.analysis.claims import checks, rules, table
    from workbench.analysis.claims.evidence import Evidence
    from workbench.studies import lifecycle, tuning
    from workbench.tracking import ui
    from workbench.training.config import merge, parse_override, read, resolve

    folder = writable_folder("--out", out / name)
    settings = read(experiment or DEFAULT) | {"sweep.trials": 0}  # the arms alone
    if quick:
        settings = merge(tuning.without(settings, "sweep.tuning"), QUICK)
    settings = merge(settings, dict(parse_override(text) for text in overrides))
    config = resolve(settings)
    silence_transformers()
    workers = workers or default_workers(config.model.device)
    planned = len(tuning.candidates(settings))
    arms = len(config.sweep.arms) * max(1, len(config.sweep.seeds))
    click.echo(f"{planned} runs to tune the arms, then {arms} runs of {len(config.sweep.arms)} arms; progress below.")
    try:
        lifecycle.run_study(settings, name, workers)
        checks.run_checks(settings, f"{name}-checks")
    except KeyboardInterrupt:
        click.echo(f"Stopped; finished runs of study {name!r} are kept. To go on: the same command again.", err=True)
        raise
    runs = tracking.load_runs(name)
    evidence = Evidence(
        runs, tracking.load_history(runs), tracking.load_samples(runs), tracking.load_runs(f"{name}-checks")
    )
    rows = rules.judge(rules.CLAIMS, evidence)
    client = tracking.connect()
    links = ui.claim_links(client, name, {row["number"]: row["arms"] for row in rows if row["arms"]})
    for row in rows:
        row["link"] = links.get(row["number"]) or tracking.ui_link(client, f"{name}-checks")
    tuned = lifecycle.tuned_values(settings, name) if planned else {}
    text = table.markdown(rows, tuned, config)
    data = json.dumps(rows, indent=2, allow_nan=False) + "\n"
    written = [_write(folder / "claims.md", text), _write(folder / "claims.json", data)]
    if any(written):
        tracking.attach(name, folder / "claims.md", "claims")
        tracking.attach(name, folder / "claims.json", "claims")
    click.echo(table.plain(rows))
    click.echo(f"\nWritten: {folder / 'claims.md'}, {folder / 'claims.json'}{'' if any(written) else ' (unchanged)'}")
    click.echo(f"Make the figures:  {this_python()} -m workbench.report --study {name}")
    click.echo(f"Open the UI:       {tracking.ui_command()}\n                   {tracking.ui_link(client, name)}")


def _write(path: Path, text: str) -> bool:
    """Write a file where its content changes; whether it did."""
    from workbench.common.cache import in_place

    if path.is_file() and path.read_text() == text:
        return False
    with in_place(path) as partial:
        partial.write_text(text)
    return True


main = command(main)

if __name__ == "__main__":
    main()
