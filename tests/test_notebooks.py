"Every notebook without parameters runs from top to bottom, asserts included, in under a minute; the others: their own tests."

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [f for f in sorted((ROOT / "nbs").glob("*.ipynb")) if '"parameters"' not in f.read_text()]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)
def test_runs(notebook, tmp_path, monkeypatch, capfd):
    "In this process, which has loaded the libraries once; each notebook has names, a home and figures of its own."
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    matplotlib.use("agg", force=True)
    passed, _ = run_notebook(notebook, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    plt.close("all")
    assert passed, capfd.readouterr().err[-4000:]
