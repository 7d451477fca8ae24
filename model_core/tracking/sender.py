"""Applies the events of spools to an MLflow server or database. Each method may be repeated and leaves the same history.

Only `MlflowClient` is used, with explicit ids: the fluent API keeps one active run a process, adopts MLFLOW_RUN_ID once only, and refuses
model inputs on open-source servers. Bytes stay where they are: MLflow gets uris and digests, and small pictures.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

PIPELINE = "pipeline"  # tag `stage` of the parent run
BATCH_METRICS, BATCH_PAIRS = 1000, 100  # what one request may hold
_DIGEST_CHARACTERS = 32  # of a dataset: MLflow allows 36, a sha256 has 64; the whole one is a tag

# A tracking outage must be noticed in seconds: MLflow's own defaults wait for minutes.
_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class RunVanished(Exception):
    """The server does not know the run any more: its database is another one."""


class Sender:
    """One connection to MLflow. Methods raise MlflowException; `is_refusal` tells what no repetition will mend."""

    def __init__(self, tracking_uri: str, *, artifacts: Path) -> None:
        for name, value in _LIMITS.items():
            os.environ.setdefault(name, value)
        import mlflow  # takes seconds, so it is not imported before there is something to send

        mlflow.set_tracking_uri(tracking_uri)  # making a model version looks models:/ID up there, whatever client is used
        self._client = mlflow.MlflowClient(tracking_uri, registry_uri=tracking_uri)
        self._remote = tracking_uri.startswith(("http://", "https://"))
        self._artifacts = artifacts
        self._experiments: dict[str, str] = {}
        self._images: dict[str, set[str]] = {}

    def experiment(self, name: str) -> str:
        """The id of the experiment, made when there is none."""
        if name not in self._experiments:
            from mlflow.exceptions import MlflowException

            found = self._client.get_experiment_by_name(name)
            if found is None:
                # A server has its own store for artifacts; without one they must not land in the folder we happen to run in.
                location = None if self._remote else f"{self._artifacts.resolve().as_uri()}/{_slug(name)}"
                try:
                    # The interface would otherwise take training runs for evaluations of a language model.
                    self._client.create_experiment(
                        name, artifact_location=location, tags={"mlflow.experimentKind": "custom_model_development"}
                    )
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                found = self._client.get_experiment_by_name(name)
                assert found is not None, "it was made a moment ago"
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def pipeline_run(self, experiment_id: str, run: str, *, started: int) -> str:
        """The id of the parent run of a pipeline run, found by its tags or made."""
        condition = f"tags.`darkroom.run` = '{run}' AND tags.stage = '{PIPELINE}'"
        return self._find_or_create(experiment_id, condition, name=run, started=started, tags={"darkroom.run": run, "stage": PIPELINE})

    def step_run(self, experiment_id: str, start: dict[str, Any], *, parent: str | None) -> str:
        """The id of a step's run: the one a platform has made for it, else found by its tags or made below `parent`."""
        label = start["step"] if start["stage"] is None else f"{start['step']}-{start['stage']}"
        tags = {"darkroom.run": start["run"], "stage": label, "stage_key": start["key"]}
        if start["adopt"]:
            self.tags(start["adopt"], tags)
            return str(start["adopt"])
        condition = f"tags.`darkroom.run` = '{start['run']}' AND tags.stage_key = '{start['key']}'"
        tags |= {"mlflow.parentRunId": str(parent)}
        return self._find_or_create(experiment_id, condition, name=label, started=start["time"], tags=tags)

    def set_status(self, run_id: str, status: str, *, ended: int | None = None) -> None:
        """RUNNING, or one of the three ends at the time `ended`."""
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status=status, end_time=ended)

    def is_deleted(self, run_id: str) -> bool:
        """Whether somebody has deleted the run. Raises RunVanished when the server does not know it at all."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunVanished(run_id) from error
            raise

    def metrics(self, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
        """Points (name, value, time, step). A point that the server has is not stored twice, as its time is the same."""
        from mlflow.entities import Metric

        self._client.log_batch(run_id, metrics=[Metric(name, value, moment, step) for name, value, moment, step in points])

    def tags(self, run_id: str, values: dict[str, str]) -> None:
        """Sets tags."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in values.items()])

    def params(self, run_id: str, values: dict[str, str]) -> None:
        """Sets parameters, below `cfg/`."""
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(f"cfg/{name}", value) for name, value in values.items()])

    def image(self, run_id: str, file: Path, *, key: str, step: int, moment: int) -> None:
        """One picture of a series. MLflow names each upload anew, so what is there is looked up first."""
        import PIL.Image

        if run_id not in self._images:
            self._images[run_id] = {Path(found.path).name.rpartition("+")[0] for found in self._client.list_artifacts(run_id, "images")}
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{moment}"
        if name not in self._images[run_id]:
            with PIL.Image.open(file) as picture:
                self._client.log_image(run_id, picture.convert("RGB"), key=key, step=step, timestamp=moment)
            self._images[run_id].add(name)

    def dataset(self, run_id: str, event: dict[str, Any]) -> None:
        """A dataset that the run has read; one that it has left is an input with the context "output", MLflow having no outputs of data."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=event["name"],
            digest=event["digest"][:_DIGEST_CHARACTERS],
            source_type="s3" if event["uri"].startswith("s3://") else "local",
            source=json.dumps({"uri": event["uri"]}),
            profile=json.dumps({"num_rows": event["rows"]}) if event["rows"] is not None else None,
        )
        tags = {"mlflow.data.context": event["context"], "digest": event["digest"], "uri": event["uri"][:500], "rows": event["rows"]}
        named = [InputTag(name, str(value)) for name, value in tags.items() if value is not None]
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, named)])
        if event["context"] == "output":
            self.tags(run_id, {f"output.dataset/{event['name']}": event["digest"]})

    def model_input(self, run_id: str, experiment_id: str, event: dict[str, Any]) -> str:
        """The run has used a model; returns its id."""
        from mlflow.entities import LoggedModelInput

        model_id = self._model(experiment_id, event, source_run=None)
        inputs = self._client.get_run(run_id).inputs
        if model_id not in [found.model_id for found in (inputs.model_inputs if inputs else [])]:
            self._client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
        return model_id

    def model_output(self, run_id: str, experiment_id: str, event: dict[str, Any]) -> str:
        """The run has left a model; returns its id."""
        from mlflow.entities import LoggedModelOutput

        model_id = self._model(experiment_id, event, source_run=run_id)
        outputs = self._client.get_run(run_id).outputs
        if model_id not in [found.model_id for found in (outputs.model_outputs if outputs else [])]:
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        return model_id

    def register(self, run_id: str, model_id: str, event: dict[str, Any], *, tags: dict[str, str]) -> str:
        """Makes the model a version of a registered model and moves the alias there; returns the version."""
        from mlflow.exceptions import MlflowException

        name, source = event["name"], f"models:/{model_id}"
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = [found for found in self._client.search_model_versions(f"name='{name}'") if found.tags.get("digest") == tags["digest"]]
        if known:
            version = known[0]
        else:  # a server wants the model's id beside the source that names it
            version = self._client.create_model_version(name, source, run_id=run_id, tags=tags, await_creation_for=0, model_id=model_id)
        self._client.set_registered_model_alias(name, event["alias"], version.version)
        return str(version.version)

    def _find_or_create(self, experiment_id: str, condition: str, *, name: str, started: int, tags: dict[str, str]) -> str:
        """MLflow has no unique names: should two drainers create at once, both then take the older run, and the younger is deleted."""
        found = self._oldest(experiment_id, condition)
        if found is None:
            mine = self._client.create_run(experiment_id, start_time=started, tags=tags, run_name=name).info.run_id
            found = self._oldest(experiment_id, condition) or mine
            if found != mine:
                self._client.delete_run(mine)
        return found

    def _oldest(self, experiment_id: str, condition: str) -> str | None:
        runs = self._client.search_runs([experiment_id], condition, max_results=10)
        return min(((run.info.start_time, run.info.run_id) for run in runs), default=(0, None))[1]

    def _model(self, experiment_id: str, event: dict[str, Any], *, source_run: str | None) -> str:
        """The id of the model with this digest, made as an external one: a small MLmodel file, and tags that say where the weights lie."""
        from mlflow.models.model import MLMODEL_FILE_NAME
        from mlflow.models.utils import get_external_mlflow_model_spec

        found = self._client.search_logged_models([experiment_id], filter_string=f"tags.digest = '{event['digest']}'", max_results=1)
        if found:
            model = found[0]
        else:
            tags = {"uri": event["uri"], "digest": event["digest"], "mlflow.model.isExternal": "true"}
            model = self._client.create_logged_model(
                experiment_id, name=event["name"], source_run_id=source_run, tags=tags, params=event.get("params") or None
            )
        if str(model.status) != "READY":
            with tempfile.TemporaryDirectory() as folder:
                get_external_mlflow_model_spec(model).save(str(Path(folder) / MLMODEL_FILE_NAME))
                self._client.log_model_artifacts(model.model_id, folder)
            self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)


def is_refusal(error: Exception) -> bool:
    """Whether the server has understood and said no, so that sending the same again is in vain."""
    from mlflow.exceptions import MlflowException

    refused = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
    return isinstance(error, MlflowException) and error.error_code in refused


def _slug(name: str) -> str:
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in name)
