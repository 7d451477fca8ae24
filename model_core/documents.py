"""Documents that users write: read, changed by `--set`, and refused in one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError


class UserError(ValueError):
    """A mistake of the user's: one sentence with what, where, found and allowed. Commands print it and exit with 2."""


def override(document: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of `document` with each `a.b=value` of `assignments` set; values are YAML.

    Raises UserError for an assignment that is not of that form or walks into something that is not a mapping.
    """
    result: dict[str, Any] = json.loads(json.dumps(document))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not all(path.split(".")):
            raise UserError(f"--set {assignment!r}: found no a.b=value; an example is --set mmdit.stages.S6.lr=1e-5")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {path}: the value {text!r} is not YAML ({str(error).splitlines()[0]})") from error
        *parents, leaf = path.split(".")
        node: Any = result
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UserError(f"--set {path}: {'.'.join(parents)} is a value, not a section, so it has no key {leaf!r}")
        node[leaf] = _number(value)
    return result


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; a recipe means a number."""
    if isinstance(value, str):
        try:
            return float(value) if value.strip().lower() not in ("nan", "inf", "-inf") else value
        except ValueError:
            return value
    return value


def read_document(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError, naming the file, when it is missing, not YAML or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror if isinstance(error, OSError) else 'not UTF-8 text'})") from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{what} {path}: not YAML{where} ({getattr(error, 'problem', None) or 'unreadable'})") from error
    if not isinstance(document, dict):
        raise UserError(f"{what} {path}: found {type(document).__name__}; allowed is a mapping of sections")
    return document


def describe(error: ValidationError, where: str) -> str:
    """One sentence for the first problem that pydantic found: what, where, found, allowed."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{where}: {field} is not a known key{more}"
    if first["type"] == "missing":
        return f"{where}: {field} is missing{more}"
    found = "" if first["type"] == "value_error" else f"found {json.dumps(first['input'], default=str)[:80]}; "
    return f"{where}: {field}: {found}{message[0].lower() + message[1:]}{more}"


def canonical_digest(value: Any) -> str:
    """sha256 (hex) of `value` as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
