"Trainings that are killed, and trainings that are shared by two processes."

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

from cxr_book.core import CxrError, Run, Settings
from cxr_book.data import read
from cxr_book.layers import read_weights
from cxr_book.learner import Learner, Stage, make_fabric
from cxr_book.loader import Loader, build_cache
from cxr_book.phantom import PhantomSettings, draw_dataset
from cxr_book.splits import official_split
from train_toy import Toy

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
    told = start(drawn, tmp_path / "killed", 12, 10, 1)
    assert json.loads([line for line in told.splitlines() if line.startswith("{")][-1])["died"] >= 5
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


class NoData:
    "A loader without a batch."

    batch_size, rows = 1, []

    def __len__(self):
        return 0

    def shard(self, rank, world):
        return self

    def epoch(self, *_):
        return iter(())


def learner_without_data(folder):
    run = Run(folder, Settings())
    return run, Learner(Toy(), NoData(), NoData(), run, [Stage(epochs=0)], fabric=make_fabric("cpu"))


class Staged(Toy):
    "Three stages without an epoch; `begin` leaves a trace in a buffer, and may be cut off."

    def __init__(self, cut=""):
        super().__init__()
        self.cut, self.begun = cut, []
        self.register_buffer("seen", torch.tensor(0.0))

    def begin(self, stage, train):
        self.begun.append((stage, train))
        self.seen += 1
        if stage == self.cut:
            raise RuntimeError("power cut")

    def stages(self):
        return [Stage(name=name, epochs=0) for name in "abc"]


def staged(folder, stages=None, cut=""):
    return Learner(Staged(cut), NoData(), NoData(), Run(folder, Settings()), stages, fabric=make_fabric("cpu"))


def test_stages_may_be_some_of_the_methods_own(tmp_path):
    some = (None, "abc"), (slice(1), "a"), (slice(1, None), "bc"), (slice(-1, None), "c"), ([Stage(name="d")], "d"), ([], "")
    for stages, names in some:
        assert [stage.name for stage in staged(tmp_path / "run", stages).stages] == [*names]
    learner = staged(tmp_path / "run", slice(1, None))
    learner.fit()
    assert learner.method.begun == [("b", learner.whole), ("c", learner.whole)]


def test_a_kill_while_a_stage_begins_loses_only_that(tmp_path):
    cut = staged(tmp_path / "run", cut="b")
    with pytest.raises(RuntimeError, match="power cut"):
        cut.fit()
    again, finished = staged(tmp_path / "run"), staged(tmp_path / "run")
    again.fit()
    assert [stage for stage, _ in again.method.begun] == ["b", "c"] and again.method.seen == 3  # a's, from the state
    finished.fit()
    assert finished.method.begun == [] and finished.method.seen == 3


def test_a_foreign_state_is_refused(tmp_path):
    run, learner = learner_without_data(tmp_path / "run")
    torch.save({"model": os.system}, run.state / "last.pt")  # a pickle that names a function
    with pytest.raises(CxrError, match="last.pt"):
        learner.fit()


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    run, learner = learner_without_data(tmp_path / "run")
    learner.now = dict(stage=0, epoch=3)
    learner._save()
    before = (run.state / "last.pt").read_bytes()

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", full)
        learner.now = dict(stage=0, epoch=4)
        with pytest.raises(CxrError, match="disk is full"):
            learner._save()
    assert (run.state / "last.pt").read_bytes() == before and len(list(run.state.iterdir())) == 1
    assert learner._load()["epoch"] == 3


def test_what_a_kill_tore_is_swept_up(tmp_path):
    run, learner = learner_without_data(tmp_path / "run")
    (run.state / ".last.pt.123.tmp").write_bytes(b"half of a state")
    learner.fit()
    assert not list(run.state.iterdir())


def test_early_stopping(drawn, tmp_path):
    "Nothing gets better after the first epoch: two more, then it stops, with the weights of the first."
    radiographs = read(drawn)
    split = official_split(radiographs, valid=0.3)
    cached = build_cache(radiographs, size=64, folder=tmp_path / "cache")
    loaders = [Loader(cached, radiographs, rows, 8, drop_last=True) for rows in (split.train, split.valid)]
    stages = [Stage(epochs=9, patience=2, monitor="auroc", lr=1e-3)]
    run, scores = Run(tmp_path / "run", Settings()), iter([0.7, 0.6, 0.7, 0.9])
    learner = Learner(Toy(), *loaders, run, stages, lambda y, logits: dict(auroc=next(scores)), make_fabric("cpu"))
    seen, close = [], learner._close_epoch
    learner._close_epoch = lambda *a: (seen.append(learner.method.classifier.conv.weight.clone()), close(*a))
    assert len(learner.fit()) == 3
    assert torch.equal(learner.method.classifier.conv.weight, seen[0]) and not torch.equal(seen[0], seen[2])


def test_a_part_smaller_than_a_batch_is_refused(drawn, tmp_path):
    radiographs = read(drawn)
    cached = build_cache(radiographs, size=64, folder=tmp_path / "cache")
    train, valid = (Loader(cached, radiographs, range(3), 8, drop_last=drop) for drop in (True, False))
    learner = Learner(Toy(), train, valid, Run(tmp_path / "run", Settings()), [Stage(epochs=1)], fabric=make_fabric("cpu"))
    with pytest.raises(CxrError, match="batch_size = 8: the training part has 3 images"):
        learner.fit()


def test_opencv_leaves_the_cores_to_torch():
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        make_fabric("cpu")
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)
