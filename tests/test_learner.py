"Trainings that are killed, and trainings that are shared by two processes."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cxr_book.core import CxrError, Run, Settings
from cxr_book.layers import read_weights
from cxr_book.learner import Stage
from cxr_book.phantom import PhantomSettings, draw_dataset

HERE = Path(__file__).parent
TOLERANCE = 2e-4  # two processes add the same gradients in another order, 30 times


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_dataset(PhantomSettings(n_images=80, size=64), tmp_path_factory.mktemp("drawn") / "set")


def start(drawn, out, *more, launcher=()):
    command = [sys.executable, *launcher, HERE / "train_toy.py", drawn, out.parent / "cache", out, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def figures(out):
    "The history without what depends on the clock."
    history = json.loads((out / "history.json").read_text())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in history]


@pytest.mark.slow
def test_killed_ten_times(drawn, tmp_path):
    told = start(drawn, tmp_path / "killed", 6, 10, 1)
    assert json.loads([line for line in told.splitlines() if line.startswith("{")][-1])["died"] >= 4
    whole, killed = (tmp_path / name for name in ("killed-whole", "killed"))
    assert figures(killed) == figures(whole)
    whole, killed = (read_weights(run / "weights.safetensors")[0] for run in (whole, killed))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    assert not [p for p in (tmp_path / "killed").rglob("*") if p.name.endswith(".tmp") and "state" not in p.parts]


@pytest.mark.slow
def test_two_processes_equal_one(drawn, tmp_path):
    start(drawn, tmp_path / "one", 2)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    start(drawn, tmp_path / "two", 2, launcher=two)
    for a, b in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert a["stage"] == b["stage"]
        for key in ("train_loss", "valid_loss"):
            assert b[key] == pytest.approx(a[key], rel=TOLERANCE), (a, b)
    one, two = (read_weights(tmp_path / name / "weights.safetensors")[0] for name in ("one", "two"))
    worst = max(float((one[k] - two[k]).abs().max()) for k in one)
    assert worst < 10 * TOLERANCE, worst


def test_a_foreign_state_is_refused(tmp_path):
    from train_toy import Toy

    from cxr_book.learner import Learner, make_fabric

    run = Run(tmp_path / "run", Settings())
    torch.save({"model": os.system}, run.state / "last.pt")  # a pickle that names a function

    class NoData:
        def shard(self, rank, world):
            return self

    learner = Learner(Toy(), NoData(), NoData(), run, [Stage()], fabric=make_fabric("cpu"))
    with pytest.raises(CxrError, match="last.pt"):
        learner.fit()
