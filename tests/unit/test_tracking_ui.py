"""The command behind `darkroom ui`."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_core.documents import UserError
from model_core.tracking.ui import page_url, ui_command


def test_local_database_is_served_on_this_machine_only(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    command = ui_command(f"sqlite:///{tmp_path}/mlflow.db", port=5001)
    for option, value in (("--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"), ("--host", "127.0.0.1"), ("--port", "5001")):
        assert command[command.index(option) + 1] == value


@pytest.mark.parametrize(
    ("uri", "said"), [("http://mlflow:5000", "is a server already"), ("sqlite:////nowhere/mlflow.db", "does not exist yet")]
)
def test_what_cannot_be_served_is_said_in_one_sentence(uri: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ui_command(uri)


def test_page_opens_in_the_mode_for_training_runs() -> None:
    assert page_url("http://127.0.0.1:5000/") == "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
    assert page_url("http://h", experiment_id="3") == "http://h/#/experiments/3?workflowType=machine_learning"
