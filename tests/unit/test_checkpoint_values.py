"""State taken apart into tensors and JSON, and put together again."""

from __future__ import annotations

import json
import math
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch

from model_core.training.checkpoint.values import put_together, take_apart


def through_json(state: Any) -> Any:
    document, tensors = take_apart(state)
    return put_together(json.loads(json.dumps(document)), tensors)


@pytest.mark.parametrize(
    "state",
    [
        {"count": 3, "big": 2**80, "name": "curve", "flag": True, "none": None},
        {"nested": [{"step": 1, "loss": 0.1}, [], {}], "betas": (0.9, 0.99), "deep": ((1,), [2])},
        {"floats": [0.1, 1e-310, -0.0, 1.7976931348623157e308, float("inf"), random.Random(0).random()]},
    ],
)
def test_values_that_are_no_tensors_come_back_equal_and_of_the_same_type(state: dict[str, Any]) -> None:
    found = through_json(state)
    assert found == state
    assert repr(found) == repr(state)  # tells 1 from True and 1.0, -0.0 from 0.0, a tuple from a list


def test_not_a_number_stays_one() -> None:
    assert math.isnan(through_json({"loss": float("nan")})["loss"])


def test_tensors_are_named_by_where_they_are() -> None:
    first, second = torch.zeros(2), torch.ones(3)
    document, tensors = take_apart({"model": OrderedDict({"a.weight": first}), "list": [1, {"x": second}]})
    assert tensors == {"model/a.weight": first, "list/1/x": second}
    found = put_together(document, tensors)
    assert found["model"]["a.weight"] is first
    assert found["list"][1]["x"] is second


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state": {3: "x"}}, "state has the key 3"),
        ({"state": {"$tensor": "x"}}, r"state has the key '\$tensor'"),
        ({"part": {"rule": object()}}, "part/rule is a object"),
        ({"a": {"b": torch.zeros(1)}, "a/b": torch.zeros(1)}, "two tensors have the name 'a/b'"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused_and_named(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_apart(state)
