"""`python -m workbench.study`: how a study stands, going on with it, its best model, putting it right."""

import json
from contextlib import suppress
from pathlib import Path

import click

from workbench.common.command_line import command, default_workers, one_process, silence_transformers, workers_option
from workbench.common.validation import study_name, writable_folder


@click.group(context_settings={"max_content_width": 100})
def main() -> None:
    """Look after studies: `status`, `resume`, `best`, `doctor`, `relocate`, `export`, `rename`, `forget`, `delete`.

    Studies lie in $WORKBENCH_STORAGE (default: optuna.db here), their runs in $MLFLOW_TRACKING_URI (default: mlflow.db
    here), snapshots of unfinished trials in $WORKBENCH_STATE (default: .workbench here).
    """


name_argument = click.argument("name", metavar="NAME")
maybe_name_argument = click.argument("name", metavar="[NAME]", required=False)


@maybe_name_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def status(name: str | None, as_json: bool) -> None:
    """Show trials by state, the best, the workers and the time left.

    Without a NAME it shows all studies. A study whose runs are in MLflow and whose trials are lost is then named in a
    line of its own; with --json that line goes to standard error.
    """
    # Each command imports what it needs by itself, so that --help does not wait for torch, Optuna and MLflow.
    from workbench.common.errors import Failure, UserError
    from workbench.common.paths import storage_url
    from workbench.common.secrets import hide_passwords
    from workbench.studies import storage
    from workbench.studies.status import in_words, lost_studies, status_of

    url = storage_url()
    wanted = [study_name(name)] if name else storage.names(url)
    try:
        statuses = [status_of(storage.require_study(each, url)) for each in wanted]
    except UserError:
        with suppress(Failure):  # where the tracking store does not answer, that there is no such study is all
            if name and (lost := lost_studies(url, name)):
                raise UserError(lost[0]) from None
        raise
    if as_json:
        click.echo(json.dumps(statuses, indent=2))
    else:
        for each in statuses:
            click.echo(in_words(each))
    if name:
        return
    try:
        lost = lost_studies(url)
    except Failure as error:  # what is known has been said
        click.echo(f"Whether other studies' runs are there is not known: {error}", err=True)
        lost = []
    if not statuses and not lost and not as_json:  # for programs an empty list says it
        none = storage.missing(url) or f"no study yet in {hide_passwords(url)}; run python -m workbench.sweep"
        lost = [f"{none}."]
    for line in lost:
        click.echo(f"{line[0].upper()}{line[1:]}", err=as_json)


@name_argument
@workers_option
@click.option("--trials", type=click.IntRange(1), help="Finished trials in all, if it shall be another number now.")
def resume(name: str, workers: int | None, trials: int | None) -> None:
    """Go on with a study where it stands.

    Its settings are kept with it, so no file is needed. Trials whose workers died go on from their snapshots. On a
    cluster, every machine may do this at once.
    """
    one_process()
    from workbench.common.paths import storage_url
    from workbench.studies import lifecycle, storage

    experiment = lifecycle.stored_experiment(storage.require_study(study_name(name), storage_url()))
    if trials is not None:
        experiment = experiment.changed({"sweep.trials": trials})
    lifecycle.run_study(experiment, name, workers or default_workers(experiment.config.model.device))


@name_argument
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Empty or new folder for the model.")
@click.option("--trial", type=click.IntRange(0), metavar="N", help="This trial. Default: the best by the objective.")
def best(name: str, output: Path, trial: int | None) -> None:
    """Put the best trial's model into a folder that diffusers loads.

    The model is trained again with the trial's settings and seed, which gives the same weights, and takes as long as
    the trial took. Stopped, the same command goes on. Runs of a study with `train.keep = true` have their weights in
    MLflow too.

    \b
    Example:
      python -m workbench.study best default --output best/
    """
    one_process()
    from workbench.common.paths import require_places, storage_url
    from workbench.common.signals import stop_on_signals
    from workbench.studies import lifecycle
    from workbench.studies.best import chosen_trial, folder_for, how_to_draw, retrain

    silence_transformers()
    with lifecycle.reading(study_name(name), storage_url()) as study:
        experiment = lifecycle.stored_experiment(study)
        chosen = chosen_trial(study, trial)
        config = experiment.trial_config(chosen)
        require_places()
        model = folder_for(config, study, chosen.number, output)
        with stop_on_signals("SIGINT", "SIGTERM", "SIGHUP") as stopping:
            final = retrain(config, study, chosen.number, model, stopping=stopping)
    if final is None:
        click.echo(f"\n{output} has the model of trial {chosen.number} already.\n{how_to_draw(output, config)}")
        return
    before = dict(zip(experiment.sweep.objectives, chosen.values, strict=True))
    click.echo(f"\nTrial {chosen.number}: " + ", ".join(f"{k} {v:.4f}, now {final[k]:.4f}" for k, v in before.items()))
    click.echo(how_to_draw(output, config))


@maybe_name_argument
@click.option("--dry-run", is_flag=True, help="Say what is wrong and change nothing.")
def doctor(name: str | None, dry_run: bool) -> None:
    """Find what killed machines left behind and put it right.

    In the study called NAME, or in all. Trials whose worker is gone are queued again; runs left RUNNING, or that say
    something else than their trials, end as Optuna has it; runs whose trials this study database has lost are set aside
    under another name; metrics and files that could not be delivered, since the tracking store was away, are delivered;
    a missing history is written anew from the metrics; snapshots that nobody needs are removed. Living workers, and all
    that other studies made, are left alone. Exit code 1 if something is left that cannot be mended.
    """
    from workbench.common.errors import Failure
    from workbench.common.paths import storage_url
    from workbench.studies import lifecycle
    from workbench.studies.doctor import Doctor
    from workbench.studies.storage import missing
    from workbench.tracking import store

    url = storage_url()
    none = missing(url)
    if none and store.missing():
        if name:
            lifecycle.require_study(study_name(name), url)
        click.echo(f"{none[0].upper()}{none[1:]}.")
        return
    findings = list(Doctor.connected(url, dry_run).examine(study_name(name) if name else None))
    for finding in findings:
        done = {True: "mended", False: "to mend", None: "cannot be mended"}[finding.mended]
        click.echo(f"{done:17s} {finding.what}")
    click.echo("All is well." if not findings else f"{len(findings)} findings.")
    hopeless = sum(finding.mended is None for finding in findings)
    if hopeless:
        raise Failure(f"{hopeless} of {len(findings)} findings cannot be mended")


@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
def relocate(old: str, new: str) -> None:
    """Let the stores follow a project folder that was moved.

    The folder may also have been copied. OLD and NEW are its places before and after; addresses such as s3://BUCKET/x
    or mlflow-artifacts:/ will do too. MLflow stores where artifacts lie as absolute paths. They are changed in the
    tracking store of this folder, as are paths in the settings of its studies. Files are not moved: do that first. A
    copy becomes a project of its own; the original is left as it is.

    \b
    Example:
      mv project elsewhere && cd elsewhere && python -m workbench.study relocate /home/me/project /home/me/elsewhere
    """
    from workbench.common.paths import storage_url
    from workbench.studies import relocation

    # An address stays as it is; a path is made absolute, as MLflow stores it.
    old, new = (each if ":/" in each else str(Path(each).absolute()) for each in (old, new))
    changes = list(relocation.relocate(old, new, storage_url()))
    click.echo("\n".join(f"Changed: {change}" for change in changes) or f"Nothing here lies below {old}.")


@name_argument
@click.option("--out", type=click.Path(path_type=Path), help="Folder. Default: reports/NAME/export.")
def export(name: str, out: Path | None) -> None:
    """Write a study as plain files, for other tools or other machines.

    `trials.csv` and `trials.parquet` hold every attempt as Optuna has it, `runs.parquet` the parameters and last
    metrics of ended runs, `history.parquet` every metric at every step, `settings.json` what the study was made with.
    """
    from workbench.common.paths import storage_url
    from workbench.studies import storage
    from workbench.studies.export import export_study

    study = storage.require_study(study_name(name), storage_url())
    folder = writable_folder("--out", out or Path("reports") / name / "export")
    for file in export_study(study, folder):
        click.echo(f"Written: {file}")


yes_option = click.option("--yes", is_flag=True, help="Do it without a question.")


def _confirm(question: str, yes: bool) -> None:
    """Ask before something is lost.

    Raises:
        UserError: the answer is no, or there is nobody to answer.
    """
    from workbench.common.errors import UserError

    try:
        if yes or click.confirm(question):
            return
    except click.Abort:
        click.echo()
    raise UserError("nothing was changed; --yes answers the question")


@name_argument
@yes_option
def delete(name: str, yes: bool) -> None:
    """Delete a study with its trials, snapshots and runs.

    Trials and snapshots are gone for good. Its runs go into MLflow's trash, out of which they can be brought back until
    `mlflow gc` empties it. Studies of that name in other study databases are left alone, and so is NAME-tuning, a study
    of its own.
    """
    from workbench import tracking
    from workbench.common.paths import storage_place, storage_url
    from workbench.studies import alterations, lifecycle

    url = storage_url()
    lifecycle.require_study(study_name(name), url)  # first: where there is no study, connecting would make a store
    client = tracking.connect()
    # Looked up first: the question says what would be lost.
    trials, runs, snapshots = alterations.contents(client, study_name(name), url)
    what = f"{trials} trials, {runs} runs in MLflow and the snapshots of {snapshots} trials"
    _confirm(f"Delete study {name!r} of {storage_place(url)}, with {what}?", yes)
    alterations.delete(client, name, url)
    click.echo(f"Deleted study {name}. Its runs are in MLflow's trash; its reports, if any, are left.")


@name_argument
@click.argument("new", metavar="NEW")
@yes_option
def rename(name: str, new: str, yes: bool) -> None:
    """Give a study another name.

    The study is renamed in Optuna, in MLflow and among the snapshots. Studies in which its arms were tuned, such as
    NAME-tuning, are renamed with it.
    """
    from workbench import tracking
    from workbench.common.paths import storage_url
    from workbench.common.validation import checked_name
    from workbench.studies import alterations, lifecycle

    checked_name("NEW", new)
    lifecycle.require_study(study_name(name), storage_url())
    _confirm(f"Rename study {name!r} to {new!r}?", yes)
    for changed in alterations.rename(tracking.connect(), name, new, storage_url()):
        click.echo(f"Renamed: study {changed}")


@name_argument
@click.argument("trial", type=click.IntRange(0))
@yes_option
def forget(name: str, trial: int, yes: bool) -> None:
    """Let a trial no longer count, as if it had not been run.

    Its result and snapshots are gone, its run goes into MLflow's trash. All attempts at the trial go with it, and
    trials of the same settings that copied its result. `study resume` runs an arm again; for a trial whose settings the
    sampler chose, it lets the sampler choose another.
    """
    from workbench import tracking
    from workbench.common.paths import storage_url
    from workbench.studies import alterations, lifecycle

    lifecycle.require_study(study_name(name), storage_url())
    _confirm(f"Forget trial {trial} of study {name!r}?", yes)
    numbers = alterations.forget(tracking.connect(), name, trial, storage_url())
    click.echo(f"Forgotten: trial {', '.join(map(str, numbers))}")


for each in (status, resume, best, doctor, relocate, export, rename, forget, delete):
    command(each, main)

if __name__ == "__main__":
    main()
