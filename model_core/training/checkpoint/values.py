"""Nested state taken apart into tensors by name and a JSON document of all the rest, and put together again.

What is no tensor needs no pickle this way, and JSON keeps it exactly: Python writes a float with as many digits as it takes
to read the same one back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TENSOR, TUPLE = "$tensor", "$tuple"


def take_apart(state: Any, *, name: str = "") -> tuple[Any, dict[str, Any]]:
    """(JSON document, tensors by name) of nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises ValueError for anything else, naming where it is.
    """
    import torch

    tensors: dict[str, Any] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            if path in tensors:
                raise ValueError(f"checkpoint: two tensors have the name {path!r}")
            tensors[path] = value
            return {TENSOR: path}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or key in (TENSOR, TUPLE):
                    raise ValueError(f"checkpoint: {path or 'the state'} has the key {key!r}; allowed are strings but {TENSOR} and {TUPLE}")
            return {key: visit(child, f"{path}/{key}" if path else key) for key, child in value.items()}
        if isinstance(value, list | tuple):
            children = [visit(child, f"{path}/{index}") for index, child in enumerate(value)]
            return {TUPLE: children} if isinstance(value, tuple) else children
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(
            f"checkpoint: {path} is a {type(value).__name__}; allowed are tensors, numbers, strings, booleans, None, lists and dicts"
        )

    return visit(state, name), tensors


def put_together(document: Any, tensors: Mapping[str, Any]) -> Any:
    """The state that `take_apart` took apart."""
    if isinstance(document, dict):
        if TENSOR in document:
            return tensors[document[TENSOR]]
        if TUPLE in document:
            return tuple(put_together(child, tensors) for child in document[TUPLE])
        return {key: put_together(child, tensors) for key, child in document.items()}
    if isinstance(document, list):
        return [put_together(child, tensors) for child in document]
    return document
