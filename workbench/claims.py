"""`python -m workbench.claims`: every claim of the paper, measured, with an interval and a verdict."""

from pathlib import Path

import click
from click.core import ParameterSource

from workbench.common.command_line import (
    command,
    experiment_argument,
    one_process,
    set_option,
    silence_transformers,
    this_python,
    workers_option,
)
from workbench.training.settings_option import settings_option


@experiment_argument
@click.option("--quick", is_flag=True, help="2 seeds, 32 steps, no tuning: which way effects lean, but no verdicts.")
@click.option("--study", metavar="NAME", help="The study's name. Default: the file's, with -quick for --quick.")
@click.option(
    "--compare", "compared", multiple=True, metavar="FOLDER", type=click.Path(path_type=Path),
    help="Run nothing: put the verdicts that are written in these folders side by side. Repeatable.",
)  # fmt: skip
@workers_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True, help="Folder of STUDY/."
)
@set_option
@settings_option
def main(
    experiment: Path | None,
    quick: bool,
    study: str | None,
    compared: tuple[Path, ...],
    workers: int | None,
    out: Path,
    overrides: tuple[str, ...],
) -> None:
    """Check the paper's claims: train what they need, print the table, write it under OUT/STUDY/.

    Three studies, each resumable: STUDY-tuning finds the learning rate and beta of every arm, which is a method with
    its settings; STUDY runs the arms with every seed; STUDY-checks measures the claims that need no arms. What is there
    is not run again: after Ctrl-C the same command goes on, and once all is there it only judges. The rules are in
    workbench/analysis/claims/rules.py, the arms in experiments/claims.toml. On two CPU cores the default takes some
    eighty minutes.

    \b
    Examples:
      python -m workbench.claims
      python -m workbench.claims --quick
      python -m workbench.claims --workers 8
      python -m workbench.claims --study fresh --set 'sweep.seeds=[5, 6, 7, 8, 9]'
      python -m workbench.claims --compare reports/claims --compare reports/fresh
    """
    if compared:
        from workbench.analysis.claims.comparison import side_by_side

        _require_alone()
        click.echo(side_by_side(compared))
        return
    one_process()
    silence_transformers()
    from workbench.analysis.claims.run import check_claims
    from workbench.tracking import ui_command

    try:
        outcome = check_claims(
            experiment, overrides, quick=quick, study=study, workers=workers, out=out, say=click.echo
        )
    except KeyboardInterrupt:
        click.echo("Stopped; finished runs are kept. To go on: the same command again.", err=True)
        raise
    click.echo(outcome.text)
    unchanged = "" if outcome.is_new else " (unchanged)"
    click.echo(f"\nWritten: {', '.join(map(str, outcome.files))}{unchanged}")
    click.echo(f"Make the figures:  {this_python()} -m workbench.report --study {outcome.study}")
    click.echo(f"Open the UI:       {ui_command()}\n                   {outcome.link}")


def _require_alone() -> None:
    """Refuse what is given beside `--compare`, which runs nothing and would leave it unused.

    Raises:
        UserError: names all that is given.
    """
    from workbench.common.errors import UserError

    context = click.get_current_context()
    given = [
        option.opts[0] if option.param_type_name == "option" else option.make_metavar(context)
        for option in context.command.params
        if option.name != "compared" and context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE
    ]
    if given:
        raise UserError(f"--compare: runs nothing, so it takes no {', '.join(given)}")


main = command(main)

if __name__ == "__main__":
    main()
