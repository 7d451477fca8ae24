"""What README and CONTRIBUTING say can be done: every command parses, every link and path leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from pipelines.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))


def commands(document: str, program: str, *, spans: bool = True) -> list[list[str]]:
    text = (ROOT / document).read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = [*blocks.splitlines(), *(re.findall(r"`([^`\n]+)`", text) if spans else [])]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


SHOWN = [*commands("README.md", "darkroom"), *(words for name in DOCUMENTS[1:] for words in commands(name, "darkroom", spans=False))]


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_darkroom_commands_of_the_documents_parse(words: list[str]) -> None:
    context = typer.Context(get_command(app))
    command = get_command(app).get_command(context, words[1])  # type: ignore[attr-defined]
    assert command is not None
    command.make_context(words[1], words[2:])


def test_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands("README.md", "darkroom")}
    assert shown == set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist(document: str) -> None:
    for words in commands(document, "make"):
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text())
    assert [link for link in links if "://" not in link and not (folder / link).exists()] == []
