"""The parent run of each study, and the runs that are its children.

Names of studies are not unique in a tracking store: two people may both call theirs `default`. What tells studies apart
is a token, which Optuna's study and MLflow's runs both have. Whatever changes runs finds them by token; a name is only
what people type.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType

from workbench.common.errors import Failure, UserError
from workbench.common.paths import storage_place
from workbench.tracking import tags
from workbench.tracking.run_settings import as_text
from workbench.tracking.store import STATUS, experiment, restore_command

ASIDE = "-aside-"  #: between the name of a study and when its runs were set aside


@dataclass(frozen=True)
class StudyId:
    """Which study is meant.

    Attributes:
        name: what people call it.
        token: tells it from all other studies of that name.
        storage: the database that has its trials, as `storage_place` writes it.
    """

    name: str
    token: str
    storage: str = field(default_factory=storage_place)

    @property
    def address(self) -> str:
        """A text by which `require_study` finds this study even where others have its name."""
        return f"{self.name}@{self.token}"


def literal(text: str) -> str:
    """A text as it may stand between quotes in MLflow's search language, which cannot escape a quote."""
    return text.replace("'", "")


def is_deleted(run: Run) -> bool:
    """Whether a run is in the trash: the UI hides it, and MLflow refuses to change it."""
    return run.info.lifecycle_stage != "active"


def parents(client: MlflowClient, name: str) -> list[Run]:
    """The parent runs of all studies of a name, the oldest first, deleted ones included."""
    query = f"tags.`{tags.STUDY}` = '{literal(name)}' AND tags.`{tags.KIND}` = 'study'"
    return _search(client, query, ViewType.ALL)


def require_study(client: MlflowClient, text: str) -> Run:
    """The parent run of a study.

    Args:
        text: its name, or NAME@TOKEN where several studies have the name; the beginning of a token, or of the parent
            run's id, will do.
    Raises:
        UserError: there is none, it is in the trash, or there are several, none of them of this study database.
    """
    name, _, token = text.partition("@")
    found = [run for run in parents(client, name) if _matches(run, token)]
    active = [run for run in found if not is_deleted(run)]
    if not found:
        raise UserError(f"study {text!r}: not found; there are: {', '.join(study_names(client)) or 'none yet'}")
    if not active:
        raise UserError(_deleted(text, found[0]))
    if len(active) > 1:
        # One database has one study of a name. Where it was replaced, the study last started is the one it has now.
        here = [run for run in active if run.data.tags.get(tags.STORAGE) == storage_place()]
        here.sort(key=_touched)
        if not here:
            listed = ", ".join(f"{address_of(run)} ({owner_of(run)})" for run in active)
            raise UserError(f"study {text!r}: {len(active)} studies have this name, say which: {listed}")
        active = here
    return active[-1]


def parents_in(client: MlflowClient, storage: str) -> list[Run]:
    """The parent runs of all studies whose trials are in a study database, as `storage_place` writes it."""
    query = f"tags.`{tags.STORAGE}` = '{literal(storage)}' AND tags.`{tags.KIND}` = 'study'"
    return _search(client, query)


def _matches(parent: Run, token: str) -> bool:
    return parent.data.tags.get(tags.TOKEN, "").startswith(token) or parent.info.run_id.startswith(token)


def _deleted(study: str, run: Run) -> str:
    command = restore_command("runs", run.info.run_id)
    return f"study {study!r}: its run in the tracking store was deleted; restore it: {command}"


def owner_of(parent: Run) -> str:
    """The study database that has a study's trials, as a message shows it."""
    return parent.data.tags.get(tags.STORAGE) or "study database unknown"


def address_of(parent: Run) -> str:
    """NAME@TOKEN of a parent run; the run's id stands for the token of a study that has none."""
    return f"{parent.data.tags[tags.STUDY]}@{parent.data.tags.get(tags.TOKEN) or parent.info.run_id[:12]}"


def study_names(client: MlflowClient) -> list[str]:
    """Names of all studies, those of this study database first, then the one last worked on first.

    Where several studies have a name, those of other databases are listed as NAME@TOKEN.
    """
    here, names = storage_place(), list[str]()
    runs = _search(client, f"tags.`{tags.KIND}` = 'study'")
    runs.sort(key=_touched, reverse=True)
    # Sorting is stable: within each of the two groups the order by time stays.
    runs.sort(key=lambda run: run.data.tags.get(tags.STORAGE, here) != here)
    for run in runs:
        name = run.data.tags[tags.STUDY]
        names.append(name if name not in names else address_of(run))
    return names


def find_study(client: MlflowClient, study: StudyId) -> Run | None:
    """The parent run of a study, or None.

    Raises:
        Failure: it is in the trash, where nothing can be added to it.
    """
    query = f"tags.`{tags.TOKEN}` = '{study.token}' AND tags.`{tags.KIND}` = 'study'"
    for run in _search(client, query, ViewType.ALL):
        name = run.data.tags[tags.STUDY]
        if name == study.name or name.startswith(f"{study.name}{ASIDE}"):  # `NAME-checks` has the same token
            if is_deleted(run):
                raise Failure(_deleted(study.name, run))
            return run
    return None


def namesakes(client: MlflowClient, study: StudyId) -> list[Run]:
    """Parent runs of other studies of the same name."""
    return [run for run in parents(client, study.name) if run.data.tags.get(tags.TOKEN) != study.token]


def is_of(parent: Run, study: StudyId) -> bool:
    """Whether a parent run belongs to a study; that of its checks, `NAME-checks`, does too."""
    return parent.data.tags.get(tags.TOKEN) == study.token


def own_parents(client: MlflowClient, study: StudyId, *, deleted: bool = False) -> list[Run]:
    """The parent runs with a study's token: the study's and that of its checks.

    Args:
        deleted: those in the trash too.
    """
    query = f"tags.`{tags.TOKEN}` = '{study.token}' AND tags.`{tags.KIND}` = 'study'"
    return _search(client, query, ViewType.ALL if deleted else ViewType.ACTIVE_ONLY)


def all_runs(client: MlflowClient, study: StudyId) -> list[Run]:
    """Every run with a study's token. Those in the trash are left out.

    Parents come last, so that a change of all runs which is cut short leaves the study where people find it.
    """
    runs = _search(client, f"tags.`{tags.TOKEN}` = '{study.token}'")
    return sorted(runs, key=lambda run: run.data.tags.get(tags.KIND) == "study")


def rename_study(client: MlflowClient, study: StudyId, name: str) -> None:
    """Give a study's runs another name for it, and those of its checks; a study set aside keeps that name's end."""
    own = (study.name, f"{study.name}-checks")
    for parent in own_parents(client, study):
        before = parent.data.tags[tags.STUDY]
        # Else a kill cut this short after this parent, whose new name may begin with the old one.
        if before in own or before.startswith(tuple(f"{each}{ASIDE}" for each in own)):
            _rename(client, parent, name + before.removeprefix(study.name), study.storage)


def is_complete(client: MlflowClient, study: StudyId) -> bool:
    """Whether a study's parent run says that the study is complete."""
    run = find_study(client, study)
    return run is not None and run.info.status == "FINISHED" and run.data.tags.get(tags.STATE) == "complete"


def open_study(
    client: MlflowClient,
    study: StudyId,
    note: str,
    about: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> str:
    """The id of a study's parent run, set to RUNNING; the run is created if the study has none.

    Args:
        about, params: more tags, and parameters, of a run that is created. One that is there keeps its own: they say
            what made the study.
    """
    run = find_study(client, study)
    if run is None:
        own = {tags.STUDY: study.name, tags.TOKEN: study.token, tags.KIND: "study", tags.NOTE: note}
        run = client.create_run(experiment(client).experiment_id, run_name=study.name, tags={**(about or {}), **own})
        client.log_batch(run.info.run_id, params=[Param(*item) for item in as_text(params or {}).items()])
    if run.data.tags[tags.STUDY] != study.name:  # it was set aside, and its study database is back
        _rename(client, run, study.name, study.storage)
    client.set_tag(run.info.run_id, tags.STORAGE, study.storage)  # the database may have moved
    return _touch(client, run)


def open_group(client: MlflowClient, name: str, note: str) -> Run:
    """The parent run under which single runs are put; created if there is none of that name.

    A group has no trials and no token. Runs may also be added to a study whose trials are in this study database.

    Raises:
        UserError: the name belongs to a study of another database, or its run is in the trash.
    """
    found = parents(client, name)
    # A parent run without this tag is from an earlier version, and counts as this database's.
    own = [run for run in found if run.data.tags.get(tags.STORAGE, storage_place()) == storage_place()]
    for run in own:
        if is_deleted(run):
            raise UserError(_deleted(name, run))
    if found and not own:
        raise UserError(
            f"study {name!r} of this tracking store has its trials in {owner_of(found[0])}, which is not this study "
            "database; choose another --study name"
        )
    if own:
        return own[0]
    about = {tags.STUDY: name, tags.KIND: "study", tags.NOTE: note}
    about |= {tags.STORAGE: storage_place(), tags.TOUCHED: f"{time.time():.0f}"}
    run = client.create_run(experiment(client).experiment_id, run_name=name, tags=about)
    client.set_terminated(run.info.run_id, "FINISHED")  # it is never at work itself
    return run


def _touched(parent: Run) -> float:
    return float(parent.data.tags.get(tags.TOUCHED, 0))


def _touch(client: MlflowClient, run: Run) -> str:
    client.update_run(run.info.run_id, status="RUNNING")
    client.set_tag(run.info.run_id, tags.TOUCHED, f"{time.time():.3f}")
    return run.info.run_id


def membership(parent: Run) -> dict[str, str]:
    """Tags of a run that is a child of this parent run."""
    shared = {key: parent.data.tags[key] for key in (tags.STUDY, tags.TOKEN) if key in parent.data.tags}
    return {tags.PARENT: parent.info.run_id} | shared


def children(client: MlflowClient, parent: Run, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """All runs of a study, in the order in which they began.

    A study with a token has only runs with that token: an earlier version of the workbench, which knows no tokens, may
    have put another study's runs under the same parent.
    """
    query = f"tags.`{tags.PARENT}` = '{parent.info.run_id}'"
    token = parent.data.tags.get(tags.TOKEN)
    return _search(client, f"{query} AND tags.`{tags.TOKEN}` = '{token}'" if token else query, view)


def deleted_children(client: MlflowClient, parent: Run) -> list[Run]:
    """The runs of a study that are in the trash."""
    return children(client, parent, ViewType.DELETED_ONLY)


def _search(client: MlflowClient, query: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """All runs of the experiment that a query finds, the oldest first."""
    number, order, runs = experiment(client).experiment_id, ["attributes.start_time ASC"], list[Run]()
    page_token = None
    with _garbage_collection_off():
        while True:
            page = client.search_runs([number], query, view, order_by=order, page_token=page_token)
            runs += page
            page_token = page.token
            if not page_token:
                return runs


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """For code that makes many objects at once: each collection would walk through all that a notebook holds."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def finish_study(client: MlflowClient, run_id: str, metrics: Mapping[str, float], note: str, state: str) -> None:
    """Write a study's summary onto its parent run and end that run.

    Args:
        state: "complete", "interrupted" or "failed"; "running" writes the summary and leaves the run open.
    """
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
        tags=[RunTag(tags.NOTE, note), RunTag(tags.STATE, state)],
    )
    # The state comes first: a kill between the two leaves a run that is RUNNING and is looked at again, where the other
    # order would leave a FINISHED run that does not say how it ended.
    if state != "running":
        client.set_terminated(run_id, STATUS.get(state, "KILLED"))


def describe_study(client: MlflowClient, study: str, title: str, text: str, metrics: Mapping[str, float]) -> None:
    """Add a section to the description of a study's parent run, or replace the section of that title, and log metrics.

    A run that has all of it already is left as it is, and so is a study of another study database. `finish_study`
    writes the description anew.

    Args:
        title: of the last section; what follows it in an earlier description is dropped.
        text: in Markdown.
    """
    run = require_study(client, study)
    if not is_of_this_database(run):
        return
    mark = f"\n\n### {title}\n\n"
    before = run.data.tags.get(tags.NOTE, "")
    note = before.partition(mark)[0] + mark + text
    if note == before and metrics.items() <= run.data.metrics.items():
        return
    now = int(time.time() * 1000)
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
        tags=[RunTag(tags.NOTE, note)],
    )


def set_study_aside(client: MlflowClient, parent: Run) -> str:
    """Give a study in the tracking store another name, NAME-aside-..., and let it belong to no study database.

    Its runs stay what they are, and can be reported on under the new name. Should its study database come back, the
    study gets its name back when it is resumed.

    Returns:
        The new name.
    """
    name = _aside_name(parent.data.tags[tags.STUDY])
    _rename(client, parent, name, storage="")
    if parent.info.status == "RUNNING":
        client.set_terminated(parent.info.run_id, "KILLED")
    return name


def _rename(client: MlflowClient, parent: Run, name: str, storage: str) -> None:
    for run in children(client, parent):
        client.set_tag(run.info.run_id, tags.STUDY, name)
    # The parent comes last, name and owner at once: after a kill before it, the study is found as it was.
    renamed = {tags.STUDY: name, tags.STORAGE: storage, tags.RUN_NAME: name}
    client.log_batch(parent.info.run_id, tags=[RunTag(key, value) for key, value in renamed.items()])


def set_runs_aside(client: MlflowClient, runs: Sequence[Run], study: str) -> str:
    """Move runs out of a study, under a parent run called NAME-aside-..., where they no longer count for it.

    Returns:
        The name under which they are found.
    """
    name = _aside_name(study)
    about = {tags.STUDY: name, tags.KIND: "study", tags.NOTE: f"Runs set aside from study **{study}**."}
    aside = client.create_run(experiment(client).experiment_id, run_name=name, tags=about)
    for run in runs:
        # With an empty token no search for the study's runs finds them any more.
        moved = {tags.PARENT: aside.info.run_id, tags.STUDY: name, tags.TOKEN: ""}
        client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in moved.items()])
    client.set_terminated(aside.info.run_id, "KILLED")
    return name


def _aside_name(study: str) -> str:
    return f"{study}{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}"


def is_of_this_database(parent: Run) -> bool:
    """Whether a study's trials are in this study database, or nobody knows where they are."""
    return parent.data.tags.get(tags.STORAGE, storage_place()) == storage_place()
