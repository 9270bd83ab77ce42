"What several files of tests share, and the order in which they run."

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONG = ("test_chapters", "test_export", "test_segmentation", "test_notebooks", "test_batch", "test_realism")


def pytest_configure():
    "Each process of pytest-xdist keeps to its own cores: what it starts makes no pools and no threads for those of others."
    process, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if process and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[int(process.removeprefix("gw")) :: count]
        os.sched_setaffinity(0, cores or os.sched_getaffinity(0))


def pytest_collection_modifyitems(items):
    "Long files first: a process takes one file after the other, and the last ones should be short."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def run_here(monkeypatch, capfd):
    "Execute a notebook in this process, which has loaded the libraries; it has names and figures of its own."
    import matplotlib
    import matplotlib.pyplot as plt
    from nbdev.config import get_config
    from nbdev.test import test_nb

    def run(notebook, home):
        monkeypatch.setenv("CXR_BOOK_HOME", str(home))
        monkeypatch.setenv("MPLBACKEND", "agg")
        monkeypatch.setenv("IN_TEST", "1")  # `test_nb` sets it for good, and then no command of nbdev does anything
        matplotlib.use("agg", force=True)
        passed, _ = test_nb(notebook, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
        plt.close("all")
        assert passed, capfd.readouterr().err[-4000:]

    return run
