"""`python -m workbench.train`: one tracked run."""

import time
from collections.abc import Mapping
from pathlib import Path

import click

from workbench.cli import command, experiment_argument, set_option, settings_option, silence_transformers, study_name


@experiment_argument
@click.option("--study", metavar="NAME", help="Put the run into this study; default: it stands alone.")
@click.option("--name", default=None, help="The run's name. Default: the experiment file's, with the time.")
@click.option("--output", type=click.Path(path_type=Path), help="Save the trained model here, as a diffusers folder.")
@set_option
@settings_option
def main(
    experiment: Path | None, study: str | None, name: str | None, output: Path | None, overrides: tuple[str, ...]
) -> None:
    """Train once with an experiment file's settings and track the run; its sweep section is not used.

    Without a file: the defaults, which are the paper's update with a threshold on the small model.

    \b
    Examples:
      python -m workbench.train --set reference.policy=frozen
      python -m workbench.train experiments/default.toml --set train.steps=256 --output trained/
      python -m workbench.train --set lora.rank=8 --set train.lr=3e-4 --output lora/
      torchrun --nproc-per-node 2 -m workbench.train        (or: accelerate launch -m workbench.train)
    """
    from workbench.config import load, parse_override
    from workbench.errors import UserError

    config = load(experiment, dict(parse_override(text) for text in overrides))
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: not an empty folder; choose a new one")
    if output is not None:  # better now than after the training
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / ".probe").touch()
            (output / ".probe").unlink()
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    from tqdm import tqdm

    from workbench import processes, tracking
    from workbench.listeners import Silence
    from workbench.run import check, datasets, describe, execute, prepare, provenance

    silence_transformers()
    if not processes.is_main():
        execute(config, Silence(), save_to=output)
        return
    client = tracking.connect()
    check(config)
    found = tracking.find_study(client, study_name(study)) if study else None
    parent = found.info.run_id if found else None
    if study and not found:
        parent = tracking.open_study(client, study, f"Study **{study}**: single runs.")
    label = name or f"{experiment.stem if experiment else 'train'}-{time.strftime('%m%d-%H%M%S')}"
    tags = provenance() | {
        "workbench.processes": str(processes.world()),
        "workbench.kind": "run",
        "workbench.arm": label,
        "mlflow.note.content": describe(config),
    }
    if study:
        tags["workbench.study"] = study
    tracker = tracking.Tracker(
        client, label, params=config.flat(), tags=tags, datasets=datasets(prepare(config)), parent=parent
    )
    bar = tqdm(total=config.train.steps, desc=label, unit="step")

    def on_step(step: int, news: Mapping[str, float]) -> None:
        bar.update(1)
        if "divergence/policy" in news:
            bar.set_postfix(divergence=f"{news['divergence/policy']:.4f}")

    state, reason = "failed", ""
    try:
        final = execute(config, tracker, on_step=on_step, save_to=output)
        state = "complete"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except Exception as error:
        reason = str(error)
        raise
    finally:
        bar.close()
        tracker.close(state, reason)
        if parent and not found:
            client.set_terminated(parent, "FINISHED")
    for metric in ("eval/reward", "eval/win_rate", "validation/margin", "divergence/policy", "divergence/reference"):
        if metric in final:
            click.echo(f"{metric:22s} {final[metric]:.4f}")
    click.echo(f"\nOpen the UI: {tracking.ui_command()}\n             {tracking.ui_link(client, study)}")


main = command(main)

if __name__ == "__main__":
    main()
