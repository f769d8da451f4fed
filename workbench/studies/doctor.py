"""What can be wrong with a study after machines have died or files were lost, and how it is repaired.

Optuna is right about how trials ended; MLflow's runs follow. Every check only reads first, so that `dry_run` can show
what would be done. Nothing is deleted but snapshots that nobody needs: runs without trials are set aside.
"""

from collections.abc import Callable, Generator, Iterator, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from optuna import Study

from workbench import tracking
from workbench.common.errors import Failure
from workbench.common.paths import storage_place
from workbench.studies import lifecycle, ownership, recovery, storage
from workbench.studies.records import StudyRecord, TrialRecord
from workbench.studies.storage import locked, missing, open_storage, own_studies, require_writable
from workbench.studies.trials import counts
from workbench.tracking import delivery, reconcile, store, study_runs, tags
from workbench.tracking.artifacts import check_artifacts


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        what: one line about it.
        mended: whether it has been repaired; None if it cannot be.
    """

    what: str
    mended: bool | None


@dataclass(frozen=True)
class Doctor:
    """Examines studies, and repairs them unless `dry_run`.

    Attributes:
        client: of the tracking store; None where that is a file that is not there, which a dry run does not make.
        url: of the study database.
        lost_store: the tracking store's file, where it was not there before it was connected to.
    """

    client: tracking.Client | None
    url: str
    dry_run: bool
    lost_store: Path | None = None

    @classmethod
    def connected(cls, url: str, dry_run: bool) -> "Doctor":
        """With the tracking store of this folder, which is made where it is not there unless this is a dry run."""
        if not dry_run:
            require_writable(url)
        lost = store.database_path() if store.missing() else None  # asked first, since connecting makes it
        return cls(None if lost and dry_run else tracking.connect(), url, dry_run, lost)

    def examine(self, name: str | None = None) -> Iterator[Finding]:
        """What is wrong with the tracking store, and with one study or all of this study database.

        Raises:
            UserError: there is no study of that name.
            Failure: as `store`.
        """
        yield from self.store()
        lost = [*self.lost_studies(name)]
        yield from lost
        names = storage.names(self.url)
        # A lost study has been reported already, and is not in this database, where `require_study` would refuse it.
        if name is not None:
            names = [] if lost and name not in names else [name]
        for each in names:
            for finding in self.study(storage.require_study(each, self.url)):
                yield finding._replace(what=f"{each}: {finding.what}")

    def store(self) -> Iterator[Finding]:
        """What is wrong with the tracking store, and with runs that belong to no trial.

        Raises:
            Failure: it cannot be written, or its artifacts would go to another project; in a dry run a finding.
        """
        try:
            if self.client:
                check_artifacts(self.client)  # before anything is delivered or mended
        except Failure as error:
            if not self.dry_run:
                raise
            yield Finding(str(error), None)
        if self.lost_store and storage.names(self.url):  # where no study is, nothing has been lost
            what = f"there is no tracking store {self.lost_store} (MLFLOW_TRACKING_URI says where runs lie)"
            yield Finding(f"{what}; an empty one takes its place", not self.dry_run)
        waiting = delivery.undelivered() if self.client is None or self.dry_run else delivery.deliver(self.client)
        for run in waiting:
            # Without `dry_run` this is what a delivery has just left undone, so there is nothing more to try.
            yield Finding(f"run {run}: has not delivered everything it logged", False if self.dry_run else None)
        if self.client is None:
            return
        for what in reconcile.close_dead_runs(self.client, dry_run=self.dry_run):
            yield Finding(what, not self.dry_run)

    def lost_studies(self, name: str | None = None, *, with_checks: bool = True) -> Iterator[Finding]:
        """Studies whose trials this study database had, and has no longer; their runs are set aside.

        Args:
            name: look at this one only.
            with_checks: and at that of its checks, NAME-checks.
        """
        if self.client is None:
            return
        tokens = set()
        if not missing(self.url):  # asked first, since locking and opening would make files
            with locked(self.url):
                tokens = {record.token for record in own_studies(open_storage(self.url)).values()}
        for parent in study_runs.parents_in(self.client, storage_place(self.url)):
            study, token = parent.data.tags[tags.STUDY], parent.data.tags.get(tags.TOKEN)
            wanted = name is None or study == name or (with_checks and study == f"{name}-checks")
            if token is None or token in tokens or not wanted:  # without a token it never had trials
                continue
            what = f"{study}: the tracking store has its runs, the study database does not have its trials"
            aside = "" if self.dry_run else study_runs.set_study_aside(self.client, parent)
            yield Finding(f"{what}; set aside as {aside}" if aside else what, not self.dry_run)

    def study(self, study: Study) -> Iterator[Finding]:
        """What is wrong with a study."""
        # Optuna first: the checks below make the runs agree with it.
        yield from self._repaired(recovery.to_recover(study), partial(self._recover, study))
        try:
            parent = yield from self._runs(study)
        except Failure as error:  # the study's run is in the trash
            yield Finding(str(error), None)
            return
        unused = [int(path.name) for path in recovery.unused_snapshots(study)]
        problems = [f"snapshots of trial {trial}: no attempt will resume from them" for trial in unused]
        yield from self._repaired(problems, partial(recovery.remove_unused_snapshots, study))
        # Without its settings, which earlier versions did not store, a study cannot be summarised.
        if self.client and parent and not self.dry_run and StudyRecord.of(study).settings is not None:
            lifecycle.finish_study(study, self.client, parent, lifecycle.stored_experiment(study))

    def _repaired(self, problems: list[str], repair: Callable[[], object]) -> Iterator[Finding]:
        """Problems as findings, repaired unless `dry_run`; one call of `repair` is for all of them."""
        if problems and not self.dry_run:
            repair()
        yield from (Finding(problem, not self.dry_run) for problem in problems)

    def _recover(self, study: Study) -> None:
        with locked(self.url):
            recovery.recover(study)

    def _runs(self, study: Study) -> Generator[Finding, None, str | None]:
        """What is wrong with a study's runs; the id of its parent run, None where a dry run has found none.

        Raises:
            Failure: the parent run is in the trash.
        """
        own, trials = ownership.study_id(study, self.url), ownership.statuses(study)
        found = None
        if self.client:
            with locked(self.url):
                found = reconcile.adopt(self.client, own, trials, dry_run=self.dry_run)
        if self.client is None or found is None:
            yield Finding("the study has no run in the tracking store", not self.dry_run)
            yield from self._lost_runs(study, set(), set())
            if self.client is None or self.dry_run:
                return None
            with locked(self.url):
                return study_runs.open_study(self.client, own, "")
        number = found.info.run_id
        for what in reconcile.reconcile_runs(self.client, number, trials, dry_run=self.dry_run):
            yield Finding(what, not self.dry_run)
        yield from self._children(study, self.client, found)
        if found.info.status == "RUNNING" and all(t.state != "running" for t in ownership.statuses(study).values()):
            yield Finding("the study's run: is RUNNING, nobody works on it", not self.dry_run)
        return number

    def _children(self, study: Study, client: tracking.Client, parent: tracking.Run) -> Iterator[Finding]:
        """Trials whose run is missing, runs without a trial, and runs without a history."""
        trials, runs = ownership.statuses(study), study_runs.children(client, parent)
        deleted = {run.info.run_id for run in study_runs.deleted_children(client, parent)}
        yield from self._lost_runs(study, {run.info.run_id for run in runs}, deleted)
        extra = [run for run in runs if reconcile.is_extra(run, trials)]
        problems = [f"run {r.info.run_id}: trial {r.data.tags[tags.TRIAL]} has another run, or is gone" for r in extra]
        set_aside = partial(study_runs.set_runs_aside, client, extra, study.study_name)
        yield from self._repaired(problems, set_aside)
        for number, run in reconcile.without_history(client, runs):
            restore = partial(reconcile.restore_history, client, run)
            yield from self._repaired([f"run of trial {number}: no history.parquet"], restore)

    def _lost_runs(self, study: Study, there: Set[str], deleted: Set[str]) -> Iterator[Finding]:
        """Trials whose run the tracking store does not have, which nothing can bring back.

        Args:
            there: ids of the study's runs.
            deleted: ids of those in the trash.
        """
        for trial in study.get_trials(deepcopy=False):
            run_id = TrialRecord.of(trial).run_id
            if run_id is None or run_id in there or not counts(trial):
                continue
            what = f"trial {trial.number}: its run is not in the tracking store"
            if run_id in deleted:
                what = f"trial {trial.number}: its run was deleted; restore it: {store.restore_command('runs', run_id)}"
            yield Finding(what, None)
