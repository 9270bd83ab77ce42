"Every notebook without parameters runs from top to bottom, asserts included, in under a minute; the others: their own tests."

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = [f for f in sorted((ROOT / "nbs").glob("*.ipynb")) if '"parameters"' not in f.read_text()]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)
def test_runs(notebook, tmp_path):
    env = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "CXR_BOOK_HOME": str(tmp_path),
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        [BIN / "nbdev_test", "--path", notebook],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and "Success" in done.stdout + done.stderr, (done.stdout + done.stderr)[
        -4000:
    ]
