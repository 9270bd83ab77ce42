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
def run_here(monkeypatch, capfd, tmp_path):
    "Execute a notebook in this process, which has loaded the libraries; it has names and figures of its own."
    import matplotlib
    import matplotlib.pyplot as plt
    import nbformat
    from nbdev.config import get_config
    from nbdev.test import test_nb
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    def run(notebook, home, **parameters):
        if parameters:
            given = {name: str(v) if isinstance(v, Path) else v for name, v in parameters.items()}
            node, notebook = parameterize_notebook(load_notebook_node(str(notebook)), given), tmp_path / notebook.name
            nbformat.write(node, notebook)
        monkeypatch.setenv("CXR_BOOK_HOME", str(home))
        monkeypatch.setenv("MPLBACKEND", "agg")
        monkeypatch.setenv("IN_TEST", "1")  # `test_nb` sets it for good, and then no command of nbdev does anything
        matplotlib.use("agg", force=True)
        passed, _ = test_nb(notebook, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
        plt.close("all")
        assert passed, capfd.readouterr().err[-4000:]

    return run
