"""A failed run says why it failed, whatever becomes of its report."""

import pytest

from model_core.documents import UserError
from model_core.storage import NotFoundError
from pipelines import run as module


@pytest.mark.parametrize("reason", [NotFoundError("funnel.json: not found"), UserError("run: unknown"), OSError("disk full")])
def test_a_report_that_cannot_be_written_is_told_in_one_line_and_raises_nothing(reason, monkeypatch):
    def refuse(run, workspace):
        raise reason

    said: list[str] = []
    monkeypatch.setattr(module, "write_report", refuse)
    module._report_failure("r", object(), said.append)
    assert said == [f"no report: {reason}"]
