"Every notebook without parameters runs from top to bottom, asserts included, in under a minute; the others: their own tests."

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [f for f in sorted((ROOT / "nbs").glob("*.ipynb")) if '"parameters"' not in f.read_text()]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)
def test_runs(notebook, tmp_path, run_here):
    run_here(notebook, tmp_path)
