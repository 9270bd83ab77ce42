"Every chapter runs under papermill with its smoke preset on drawn and on real radiographs, and leaves a complete run folder."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CHAPTERS = sorted((ROOT / "nbs").glob("1?_*.ipynb"))


def execute(notebook, folder, home, *parameters):
    "Run a chapter; return its metrics."
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "CXR_BOOK_HOME": str(home)}
    command = [
        sys.executable,
        "-m",
        "papermill",
        notebook,
        folder.with_suffix(".ipynb"),
        "-k",
        "python3",
        "--no-progress-bar",
    ]
    command += ["-p", "preset", "smoke", "-p", "out_dir", folder, *parameters]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Drawn once, and real radiographs read once, for all chapters."
    return tmp_path_factory.mktemp("home")


def timeless(value):
    "Metrics without what differs from run to run: durations and dates."
    if isinstance(value, dict):
        return {
            k: timeless(v)
            for k, v in value.items()
            if not re.search(r"second|minute|duration|date|_s$|per_s", k)
        }
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda f: f.stem)
def test_smoke(notebook, tmp_path, home, run_here):
    folder = tmp_path / "run"
    first = execute(notebook, folder, home)
    for name in ("config.json", "metrics.json", "stamp.json"):
        assert json.loads((folder / name).read_text()), name
    assert list((folder / "figures").glob("*.png"))
    weights = {f: f.stat().st_mtime_ns for f in folder.rglob("weights.safetensors")}
    assert weights and all(f.stat().st_size for f in weights)
    given = parameterize_notebook(load_notebook_node(str(notebook)), dict(preset="smoke", out_dir=str(folder)))
    nbformat.write(given, tmp_path / notebook.name)
    run_here(tmp_path / notebook.name, home)
    assert timeless(json.loads((folder / "metrics.json").read_text())) == timeless(first)
    assert {f: f.stat().st_mtime_ns for f in weights} == weights  # nothing was trained again


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "Real radiographs: the whole test part, with all boxes, and enough others for an epoch of a few dozen batches."
    source, folder = ROOT.parent / "shared" / "chestxray14", tmp_path_factory.mktemp("real") / "chestxray14"
    if not source.is_dir():
        pytest.skip("no real radiographs beside this checkout")
    (folder / "images").mkdir(parents=True)
    for file in source.glob("*.*"):
        shutil.copy(file, folder)
    tested = set((source / "test_list.txt").read_text().split())
    files = sorted((source / "images").iterdir(), key=lambda f: (f.name not in tested, f.name))
    for file in files[: sum(f.name in tested for f in files) + 300]:
        shutil.copy(file, folder / "images")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda f: f.stem)
def test_real_radiographs(notebook, tmp_path, home, real):
    asked = ["-p", "data_root", real]
    if "ablations = " in notebook.read_text():
        asked += ["-p", "ablations", "False"]  # `test_smoke` has them
    if "rivals = " in notebook.read_text():
        asked += ["-p", "rivals", "False"]
    metrics = execute(notebook, tmp_path / "run", home, *asked)
    assert all(result["n_pairs"] == 34 for result in metrics.values() if isinstance(result, dict))
