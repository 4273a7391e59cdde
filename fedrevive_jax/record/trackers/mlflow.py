"""MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where."""

import os
import time
from collections.abc import Mapping
from typing import Any

from fedrevive_jax.record.trackers import Followed


class MLflow:
    """One run of MLflow for a run, however often it is continued."""

    def __init__(self, followed: Followed):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if followed.id:
            self.id = followed.id
            self._client.update_run(self.id, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedrevive_jax")
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(where, run_name=followed.name).info.run_id
        settings = [Param(key, str(value)) for key, value in followed.config.items()]
        # It takes so many at once.
        for start in range(0, len(settings), 100):
            self._client.log_batch(self.id, params=settings[start : start + 100])

    def add(self, values: Mapping[str, float], version: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        rows = [Metric(name, value, now, version) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=rows)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            for name, value in summary.items():
                self._client.set_tag(self.id, name, str(value))
        self._client.set_terminated(self.id, "FINISHED" if summary is not None else "KILLED")


create = MLflow
