"""Splits the project's dependencies for the image: `requirements.py PYPROJECT CONSTRAINTS` writes three files to /tmp.

`requirements.txt` is everything but kfp, `constraints.txt` the versions of what the base image does not hold already,
`kfp.txt` kfp alone, which is installed without its dependencies: its pins would rule the training environment.
"""

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path


def normal(name: str) -> str:
    """A distribution's name as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(pyproject: str, constraints: str) -> None:
    """Writes the three files."""
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    present = {normal(found.metadata["Name"]) for found in distributions()}
    versions = [line for line in Path(constraints).read_text().splitlines() if normal(line.partition("==")[0]) not in present]
    kfp = [line for line in versions if line.startswith("kfp==")]
    Path("/tmp/requirements.txt").write_text("".join(f"{line}\n" for line in wanted if not line.startswith("kfp")))
    Path("/tmp/constraints.txt").write_text("".join(f"{line}\n" for line in versions))
    Path("/tmp/kfp.txt").write_text("".join(f"{line}\n" for line in kfp))


if __name__ == "__main__":
    main(*sys.argv[1:])
