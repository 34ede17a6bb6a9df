"""A run that is killed at any moment goes on to the very end that it would have had, whatever the kill left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from training import write_config

HERE = Path(__file__).parent
SETTINGS = {
    "train__steps": 5,
    "train__estimator": "reinforce",  # which draws from torch's generator
    "train__preference": "controlled",  # which keeps what the base model prefers
    "train__deterministic": True,
    "run__save_every": 1,
    "evaluation__scales": [1.0],
    "evaluation__bootstrap": 2,
}


def test_killed_at_twenty_random_moments(tmp_path: Path, model_folder: Path) -> None:
    config = write_config(tmp_path, model_folder, **SETTINGS)
    command = [sys.executable, str(HERE / "killing.py"), str(config), "20", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = Counter(kill["kind"] for kill in kills)
    assert kinds == dict.fromkeys(("save", "evaluation", "step", "write", "time"), 4) | {"half": 1}
    for kill in kills:
        assert kill["ended"] == [-(signal.SIGXFSZ if kill["kind"] == "half" else signal.SIGKILL)], kill
        assert (kill["again"], kill["differs"]) == ([0], []), kill
        assert not [name for name in kill["files"] if name.endswith(".part")], kill
    assert len({kill["moment"] for kill in kills}) == 21
    assert any(name.endswith(".part") for kill in kills for name in kill["left"] if kill["kind"] == "write")
    half = kills[-1]["left"]
    assert [size for name, size in half.items() if name.startswith("state/.step-3.")] == [10_000]
    assert half["state/step-2.safetensors"] > 20_000
