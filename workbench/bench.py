"""`python -m workbench.bench`: what the workbench costs against what it must cost, on the machine at hand."""

from pathlib import Path

import click

from workbench.benchmarks.groups import GROUPS, GROWTH, PEERS, SLOW, chosen_groups
from workbench.common.command_line import command, device_option, one_process, silence_transformers
from workbench.common.errors import UserError
from workbench.common.validation import writable_folder


@click.option(
    "--only", "chosen", multiple=True, metavar="GROUP", type=click.Choice([*GROUPS, GROWTH]), help="Only this group."
)
@click.option("--quick", is_flag=True, help=f"Leave out what takes longest: {', '.join(SLOW)}.")
@click.option("--repeats", type=click.IntRange(5), default=15, show_default=True, help="Measurements of each ratio.")
@click.option("--sweeps", type=click.IntRange(1), default=5, show_default=True, help="Repeats of whole sweeps.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Checkout of a public script to compare with: diffusers or salesforce. Repeatable.",
)
@device_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports/bench"), show_default=True,
    help="Folder of what is written.",
)  # fmt: skip
def main(
    chosen: tuple[str, ...], quick: bool, repeats: int, sweeps: int, peers: tuple[str, ...], device: str, out: Path
) -> None:
    """Measure the workbench against its goals; writes OUT/bench.md, its figure bench.png, and bench.json.

    Every figure is the median of measurements with their 10th and 90th percentile. Ratios are of measurements taken
    in turn (A, B, A, B, ...); a control measures the same against itself and should be 1. One CPU thread unless
    OMP_NUM_THREADS says otherwise; encoding small images takes one a core, as it always does. What was measured before
    and is not measured now stays in the table.

    \b
    Groups:
      limits       what the machine can do, arithmetic and memory traffic, and how much of it training uses
      step         a training step against its floor: policy forward and backward, reference forward
      reference    the moving reference's share of training time
      diagnostics  diagnostics against the forwards they need
      encode       the share of encoding not spent in the networks
      start        the time until --help is there, a large study's status, a study's first training step
      parts        where a whole run's time goes, from its imports to its tracking (parts.png)
      memory       peak memory against the weights that must be there
      report       all figures of a study of 50 runs
      tracking     tracking's share of training time
      peers        a step of public Diffusion-DPO scripts against ours; only with --peer
      growth       how costs grow with batch, resolution, trials, workers, buckets (growth.png, growth.json)
      quality      steps to frozen Diffusion-DPO's final reward
      workers      the default sweep by two workers against one
      pruning      steps that pruning saves the default sweep

    The last three take more than an hour on two cores, parts twice as many whole runs as --sweeps says and one more;
    --quick leaves out all four. Leave the machine alone meanwhile.

    \b
    Examples:
      python -m workbench.bench --quick
      python -m workbench.bench --only step --only memory
      python -m workbench.bench --only pruning --sweeps 2
      python -m workbench.bench --only peers --peer diffusers=~/diffusers
    """
    one_process()
    folder = writable_folder("--out", out)
    silence_transformers()
    if PEERS in chosen and not peers:
        raise UserError("--only peers: needs --peer NAME=FOLDER, a checkout of a public script")
    from workbench.benchmarks.suite import run_suite

    groups, with_growth = chosen_groups(chosen, quick, bool(peers)), not chosen or GROWTH in chosen
    run_suite(
        groups, with_growth, repeats=repeats, sweeps=sweeps, device=device, folder=folder, peers=peers, say=click.echo
    )
    click.echo(f"\nWritten: {folder}")


main = command(main)

if __name__ == "__main__":
    main()
