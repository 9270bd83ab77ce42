"What the notebook of `layers` cannot say: random input and damaged files."

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from cxr_book import layers as L
from cxr_book.core import CxrError

torch.set_num_threads(1)
floats = st.floats(-30, 30, width=64)
few = settings(max_examples=40, deadline=None)


# ---------------------------------------------------------------- poolings


@few
@given(arrays(np.float64, (2, 3, 2, 4), elements=floats), st.floats(0.01, 100))
def test_lse_equals_a_plain_loop_and_lies_between_mean_and_max(x, gamma):
    got = L.LSEPool(gamma)(torch.tensor(x))
    for b in range(2):
        for c in range(3):
            cells, top = x[b, c].ravel().tolist(), x[b, c].max()
            plain = top + math.log(sum(math.exp(gamma * (v - top)) for v in cells) / len(cells)) / gamma
            assert math.isclose(got[b, c], plain, rel_tol=1e-9, abs_tol=1e-9)
            assert np.mean(cells) - 1e-6 <= got[b, c] <= top + 1e-9


@few
@given(arrays(np.float64, (1, 2, 3, 3), elements=floats))
def test_pcam_equals_a_plain_loop(x):
    got = L.PCAMPool()(torch.tensor(x))
    for c in range(2):
        cells = x[0, c].ravel()
        weight = 1 / (1 + np.exp(-cells))
        assert math.isclose(got[0, c], (weight * cells).sum() / weight.sum(), rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("pool", [L.LSEPool(10.0), L.LSELBAPool(2), L.PCAMPool(), L.MaxPool(), L.AvgPool()])
def test_pools_stay_finite_at_extremes(pool):
    x = torch.tensor([[[[1e4, -1e4]], [[-1e4, -1e4]]]], requires_grad=True)
    pool(x).sum().backward()
    assert torch.isfinite(pool(x)).all() and torch.isfinite(x.grad).all()


def test_half_precision_is_pooled_in_full():
    x = torch.randn(2, 3, 8, 8).bfloat16()
    assert L.LSEPool(10.0)(x).dtype == torch.float32
    head = L.Classifier(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).logits.dtype == torch.float32


def test_lse_lba_learns_its_sharpness():
    pool = L.LSELBAPool(2, r0=0.5)
    pool(torch.randn(1, 2, 3, 3)).sum().backward()
    assert pool.beta.grad.abs().min() > 0
    with pytest.raises(CxrError, match="r0 = 1"):
        L.LSELBAPool(2, r0=1.0)


# ---------------------------------------------------------------- losses


@few
@given(arrays(np.float64, (5, 4), elements=floats), arrays(np.int64, (5, 4), elements=st.integers(0, 1)))
def test_batch_weighted_loss_equals_a_plain_loop(z, y):
    logits = torch.tensor(z, requires_grad=True)
    got = L.BatchBCELoss()(logits, torch.tensor(y))
    got.backward()
    plain = 0.0
    for k in range(4):
        p, n = y[:, k].sum(), (1 - y[:, k]).sum()
        if p == 0 or n == 0:  # such a class is dropped from the batch
            assert not logits.grad[:, k].any()
            continue
        for i in range(5):
            log_p, log_n = -np.logaddexp(0, -z[i, k]), -np.logaddexp(0, z[i, k])
            plain -= ((p + n) / p * y[i, k] * log_p + (p + n) / n * (1 - y[i, k]) * log_n) / 5
    assert math.isclose(got.item(), plain, rel_tol=1e-5, abs_tol=1e-9)  # the weights are float32
    assert torch.isfinite(logits.grad).all()


@few
@given(arrays(np.int64, (6, 3), elements=st.integers(0, 1)), arrays(np.float64, (6, 3), elements=floats))
def test_static_weighted_loss_equals_a_plain_loop(y, z):
    got = L.StaticBCELoss(y)(torch.tensor(z), torch.tensor(y)).item()
    plain = 0.0
    for k in range(3):
        share = y[:, k].sum() / 6
        for i in range(6):
            log_p, log_n = -np.logaddexp(0, -z[i, k]), -np.logaddexp(0, z[i, k])
            plain -= ((1 - share) * y[i, k] * log_p + share * (1 - y[i, k]) * log_n) / 6
    assert math.isclose(got, plain, rel_tol=1e-5, abs_tol=1e-9)


def test_two_processes_count_the_whole_batch(monkeypatch):
    z, y = torch.randn(8, 3), (torch.rand(8, 3) < 0.3).float()
    y[0], y[7] = 1, 0
    whole = L.BatchBCELoss()(z, y)
    halves = []
    for own, other in ((slice(0, 4), slice(4, 8)), (slice(4, 8), slice(0, 4))):

        def all_reduce(counts, other=other):
            counts += torch.stack([y[other].sum(0), (1 - y[other]).sum(0)])

        monkeypatch.setattr(L.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(L.dist, "all_reduce", all_reduce)
        halves.append(L.BatchBCELoss()(z[own], y[own]))
        L.BatchBCELoss().eval()(z[own], y[own])  # in validation no process waits for another
    assert torch.allclose(sum(halves) / 2, whole)


# ---------------------------------------------------------------- weights files


def small(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU())


@pytest.fixture
def saved(tmp_path):
    module = small()
    return module, L.save_weights(module, tmp_path / "small.safetensors", {"seed": 1})


def test_a_module_loads_its_own_file(saved):
    module, file = saved
    again = small()
    assert L.load_strict(again, file) == {"seed": "1"}
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(module.eval()(x), again.eval()(x))


def test_another_modules_file_is_refused_and_nothing_changes(saved):
    _, file = saved
    other = small(lambda c: nn.GroupNorm(2, c))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CxrError, match=r"unexpected \(\d+\).*running_mean"):
        L.load_strict(other, file)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("damage", ["empty", "short", "truncated", "header", "zip", "old-pickle", "text", "missing"])
def test_damaged_files_are_refused_by_name(saved, tmp_path, damage):
    _, file = saved
    whole, bad = file.read_bytes(), tmp_path / f"{damage}.safetensors"
    if damage == "zip":
        torch.save({"w": torch.ones(1)}, bad)
    elif damage == "old-pickle":
        torch.save({"w": torch.ones(1)}, bad, _use_new_zipfile_serialization=False)
    elif damage != "missing":
        parts = {"empty": b"", "short": whole[:5], "truncated": whole[: len(whole) // 2], "header": whole[:40]}
        bad.write_bytes(parts.get(damage, b"<html>" * 9))
    with pytest.raises(CxrError, match=damage):
        L.read_weights(bad)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    torch.save(Bomb(), tmp_path / "model.pth")
    with pytest.raises(CxrError, match="pickle"):
        L.load_strict(nn.Linear(1, 1), tmp_path / "model.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    module, file = saved
    before = file.read_bytes()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(CxrError, match="disk is full"):
        L.save_weights(module, file)
    assert file.read_bytes() == before


def test_output_passes_through_fabric():
    from lightning_utilities.core.apply_func import apply_to_collection

    out = L.Output(torch.zeros(1, 2), torch.zeros(1, 2, 3, 3), {"boxes": torch.ones(1)})
    half = apply_to_collection(out, torch.Tensor, lambda t: t.half())
    assert isinstance(half, L.Output) and half.extras["boxes"].dtype == torch.float16
    bare = apply_to_collection(L.Output(*out[:2]), torch.Tensor, lambda t: t.half())
    assert bare.logits.dtype == torch.float16 and not bare.extras
