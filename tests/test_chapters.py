"Every chapter runs under papermill with its smoke preset on drawn and on real radiographs, and leaves a complete run folder."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CHAPTERS = sorted((ROOT / "nbs").glob("1?_*.ipynb"))


def execute(notebook, folder, home):
    "Run a chapter as a user does; return its metrics."
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
    command += ["-p", "preset", "smoke", "-p", "out_dir", folder]
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
    run_here(notebook, home, preset="smoke", out_dir=folder)
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
def test_real_radiographs(notebook, tmp_path, home, real, run_here):
    known, folder = notebook.read_text(), tmp_path / "run"
    less = {name: False for name in ("ablations", "rivals") if f'"{name} = ' in known}  # `test_smoke` has them
    run_here(notebook, home, preset="smoke", data_root=real, out_dir=folder, **less)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(result["n_pairs"] == 34 for result in metrics.values() if isinstance(result, dict))
