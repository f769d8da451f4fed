"""`python -m workbench.rounds`: draw, score, pair, train, and again with what was trained."""

from pathlib import Path

import click

from workbench.common.command_line import command, experiment_argument, one_process, set_option, silence_transformers
from workbench.common.paths import shipped
from workbench.common.validation import study_name
from workbench.training.settings_option import settings_option

DEFAULT = shipped("experiments/rounds.toml")


@experiment_argument
@click.option("--study", metavar="NAME", help="Track the rounds under this name. Default: the file's name.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of images, pairs and models. Default: rounds/NAME."
)
@set_option
@settings_option
def main(experiment: Path | None, study: str | None, output: Path | None, overrides: tuple[str, ...]) -> None:
    """Train a model on pairs that it has drawn itself, round after round.

    Each round draws prompts with the newest policy, scores the images by reward models, makes pairs of them
    (`python -m workbench.prefer --help` says how) and trains on these; the section `rounds` of the experiment file has
    the settings. What a round trained is what the next one's policy, its reference or both begin with. Divergence and
    gains are measured from the model that the first round began with.

    Stop it whenever you like: the same command goes on, within a round too, and does nothing where all rounds are made.
    A larger rounds.count adds rounds.

    \b
    Examples:
      python -m workbench.rounds
      python -m workbench.rounds experiments/rounds.toml --study mine --set rounds.count=5
      python -m workbench.rounds --study first --set rounds.reference=pretrained --set rounds.limit=64
      python -m workbench.report --study rounds
    """
    path = experiment or DEFAULT
    name = study_name(path.stem if study is None else study)
    one_process()
    from workbench.training.experiment_file import load, parse_override

    # Settings are checked before diffusers and transformers are imported, which takes seconds.
    config = load(path, dict(parse_override(text) for text in overrides))
    from workbench.common import paths
    from workbench.studies.rounds import run_rounds

    silence_transformers()
    paths.require_places()
    folder = output or Path("rounds") / name
    try:
        made = run_rounds(config, name, folder)
    except KeyboardInterrupt:
        click.echo(f"Stopped. What is done is kept in {folder}; the same command goes on.", err=True)
        raise
    if not made:
        click.echo(f"All {config.rounds.count} rounds are made; there is nothing to do. For more: raise rounds.count")
    click.echo(f"Folder: {folder}")


main = command(main)

if __name__ == "__main__":
    main()
