"""Every tag that the workbench sets on MLflow runs and experiments, each once."""

from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
)

KIND = "workbench.kind"  #: "study", "trial", "run" (of `train`), "check", "evaluation" or "bench"
STUDY = "workbench.study"  #: name of the study that a run belongs to, or is the parent run of
TOKEN = "workbench.study_token"  #: the token of that study, which tells it from all others of its name
STORAGE = "workbench.storage"  #: of a parent run: the database that has the study's trials, see `paths.storage_place`
TRIAL = "workbench.trial"  #: Optuna's number of the trial that a run tracks
ARM = "workbench.arm"  #: the trial's arm, "sampled" where Optuna's sampler chose; of a single run its name
RETRY_OF = "workbench.retry_of"  #: number of the trial whose interrupted attempt a run continues
STATE = "workbench.state"  #: "complete", "pruned", "interrupted" or "failed"; MLflow's status has fewer values
REASON = "workbench.reason"  #: why a run did not complete
PROCESS = "workbench.process"  #: the process that writes the run, as `common.processes.this_process` names it
STATE_FOLDER = "workbench.state_folder"  #: where the run's outbox and snapshots are, as HOST:PATH
PROCESSES = "workbench.processes"  #: how many processes train the run together
TOUCHED = "workbench.touched"  #: when a study was last started or resumed, in seconds of Unix time
CLAIMS = "workbench.claims"  #: numbers of the claims that rest on a run, each between blanks
STORE = "workbench.store"  #: of the experiment: path of the database for which its artifact location was chosen
SETTINGS = "mlflow.workbench.settings"  #: of a run: all its settings as JSON; tags in MLflow's own space are not listed
OBJECTIVE = "workbench.objective"  #: of a study: its objectives with their directions and its constraints, as JSON
SOURCE = MLFLOW_SOURCE_NAME  #: the command, which the UI shows as the run's source
SOURCE_TYPE = MLFLOW_SOURCE_TYPE  #: without it the UI does not show the source
COMMIT = MLFLOW_GIT_COMMIT  #: what the UI shows as the version
NOTE = "mlflow.note.content"  #: a description, which the UI renders as Markdown
RUN_NAME = MLFLOW_RUN_NAME  #: what the UI calls a run
PARENT = MLFLOW_PARENT_RUN_ID  #: id of the parent run
