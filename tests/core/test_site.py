"""The docs site: it builds without a warning, and every page of docs/ is in its navigation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
    assert "from_pretrained" in api and "load_decisions" in api and "SteeringPPO" in api
    assert not (tmp_path / "site" / "results" / "budgets.json").exists()


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[a-z-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}
