"""What surrounds the code names the same versions everywhere."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_pre_commit_uses_the_pinned_tools():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    dev = project["optional-dependencies"]["dev"]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "pyright"}
    (ruff,) = (line for line in dev if line.startswith("ruff"))
    for name in ("ruff-check", "ruff-format"):
        assert hooks[name]["additional_dependencies"] == [ruff]
    # The environment's, which sees what the code imports: pinned there, exactly.
    assert hooks["pyright"]["language"] == "system"
    assert any(line.startswith("pyright") and "==" in line for line in dev)
