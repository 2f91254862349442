"""MLflow: the study is an experiment, a run is a run with its fingerprint as a tag.

Where they go is said by MLFLOW_TRACKING_URI.  If it is not set, to a file of SQLite, as MLflow's own folders are at their end:
`mlflow ui --backend-store-uri sqlite:///OUT/tracking/mlflow/mlflow.db`.
"""

import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from rankwise.experiments.tracking.interface import Point, TrackedRun

AT_ONCE = 1000  # metrics in one batch: MLflow's limit; and 100 parameters
PARAMETERS = 100
TAG = "rankwise.fingerprint"


class MLflow:
    keeps = True

    def __init__(self, folder: Path, study: str):
        from mlflow.tracking import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
        place = elsewhere or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=place)
        found = self.client.get_experiment_by_name(study)
        own = None if elsewhere else (folder.resolve() / "artifacts").as_uri()
        self.experiment = found.experiment_id if found else self.client.create_experiment(study, own)
        self.ids: dict[str, str] = {}  # fingerprint -> MLflow's id

    def send(self, run: TrackedRun, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = iter([Metric(name, value, now, point.step) for point in points for name, value in point.values.items()])
        while batch := list(islice(metrics, AT_ONCE)):
            self.client.log_batch(self._id(run), metrics=batch)

    def finish(self, run: TrackedRun, status: str, summary: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self._id(run), metrics=[Metric(f"result/{n}", v, now, 0) for n, v in summary.items()])
        self.client.set_terminated(self.ids.pop(run.fingerprint), "FINISHED" if status == "completed" else "FAILED")

    def close(self) -> None:
        self.ids = {}  # an unfinished run stays "running": the next process goes on with it

    def _id(self, run: TrackedRun) -> str:
        from mlflow.entities import Param

        if run.fingerprint not in self.ids:
            found = self.client.search_runs([self.experiment], f"tags.`{TAG}` = '{run.fingerprint}'", max_results=1)
            if found:
                self.ids[run.fingerprint] = found[0].info.run_id
            else:
                made = self.client.create_run(self.experiment, tags={TAG: run.fingerprint}, run_name=run.name)
                self.ids[run.fingerprint] = made.info.run_id
                settings = [Param(name, str(value)[:500]) for name, value in run.settings.items()]
                for at in range(0, len(settings), PARAMETERS):
                    self.client.log_batch(made.info.run_id, params=settings[at : at + PARAMETERS])
        return self.ids[run.fingerprint]
