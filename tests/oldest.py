"""Print the oldest versions that pyproject allows, one `name==version` a line, for pip.

Arguments are the extras to print besides what the package itself needs.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest(*extras: str) -> list[str]:
    """The lower bound of every dependency that has one, as a requirement of just that version."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = [re.fullmatch(r"([\w-]+)>=([\w.]+)(?:,.*)?", line) for line in lines]
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    print("\n".join(oldest(*sys.argv[1:])))
