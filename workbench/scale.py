"""`python -m workbench.scale`: what a study of very many trials costs beside the training itself."""

from pathlib import Path

import click

from workbench.common.command_line import command, default_workers, one_process


@click.option("--trials", type=click.IntRange(50), default=500, show_default=True, help="Trials of the large study.")
@click.option("--alone", type=click.IntRange(10), default=50, show_default=True, help="Trials of one worker alone.")
@click.option(
    "--workers", type=click.IntRange(1), help="Workers of the large study. Default: the CPU's cores, at most 8."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports/scale"), show_default=True,
    help="Folder of what is written.",
)  # fmt: skip
def main(trials: int, alone: int, workers: int | None, out: Path) -> None:
    """Run many short trials by many workers, some by one, and say what they cost; writes OUT/scale.md and scale.json.

    Every trial is a real training of the small model of four steps, with snapshots, tracking and diagnostics
    (experiments/scale.toml). Databases are sqlite in a temporary folder, or what $WORKBENCH_STORAGE and
    $MLFLOW_TRACKING_URI name. 500 trials take some 15 minutes on two cores.
    """
    one_process()
    from workbench.benchmarks.scale import measure_scale

    click.echo(measure_scale(trials, alone, workers or default_workers("auto"), out))


main = command(main)

if __name__ == "__main__":
    main()
