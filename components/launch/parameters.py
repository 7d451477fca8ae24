"""Documents as Kubeflow parameters, which know no null (it travels as the string "null") and no integers."""

from typing import Any

NULL = "null"


def to_parameter(value: Any) -> Any:
    """The value with each None, at any depth, as a string."""
    if isinstance(value, dict):
        return {key: to_parameter(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_parameter(entry) for entry in value]
    return NULL if value is None else value


def from_parameter(value: Any) -> Any:
    """What `to_parameter` was given, with whole numbers as integers again."""
    if isinstance(value, dict):
        return {key: from_parameter(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [from_parameter(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None if value == NULL else value
