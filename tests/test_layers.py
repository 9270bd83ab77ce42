"What the notebook of `layers` cannot say: random input, damaged files, weights without a network."

import copy
import math
import re
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
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


@pytest.fixture
def saved(tmp_path):
    body = L.Body("small-resnet")
    return body, L.save_weights(body, tmp_path / "body.safetensors", {"seed": 1})


def test_a_body_loads_its_own_file_and_gives_the_same_maps(saved):
    body, file = saved
    again = L.Body("small-resnet", weights=file)
    x = torch.rand(2, 1, 64, 64)
    assert torch.equal(body.eval()(x)[-1], again.eval()(x)[-1])
    blurred = L.blur_pool(L.Body("small-resnet"))
    assert L.load_strict(blurred, file) == {"seed": "1"}  # blurring renames no weight


def test_another_bodys_file_is_refused_and_nothing_changes(saved):
    _, file = saved
    other = L.Body("small-resnet", norm="group")
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
    body, file = saved
    before = file.read_bytes()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(CxrError, match="disk is full"):
        L.save_weights(body, file)
    assert file.read_bytes() == before


# ---------------------------------------------------------------- ImageNet weights without a network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_offline_says_which_file_belongs_where(hub):
    with pytest.raises(CxrError, match="could not be downloaded") as e:
        L.Body("resnet18", weights="imagenet")
    assert str(hub / "resnet18-f37072fd.pth") in str(e.value) and "weights = None" in str(e.value)


def test_a_file_in_the_folder_is_used_also_in_densenets_old_form(hub):
    for name, file in (("resnet18", "resnet18-f37072fd.pth"), ("densenet121", "densenet121-a639ec97.pth")):
        net = torchvision.models.get_model(name).eval()
        state = net.state_dict()
        old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", k): v for k, v in state.items()}
        torch.save(old, hub / file, _use_new_zipfile_serialization=False)
        body = L.Body(name, weights="imagenet").eval()
        x = torch.rand(1, 1, 64, 64)
        with torch.no_grad():
            classes = (net.classifier if name == "densenet121" else net.fc)(body(x)[-1].mean((2, 3)))
            assert torch.allclose(classes, net(L.GreyInput()(x)), atol=1e-4)  # torchvision's own answer


def test_half_a_file_in_the_folder(hub):
    (hub / "resnet18-f37072fd.pth").write_bytes(b"half")
    with pytest.raises(CxrError, match="could not be read"):
        L.Body("resnet18", weights="imagenet")


# ---------------------------------------------------------------- bodies, freezing, blur


def test_efficientnet_cut_is_torchvisions():
    torch.manual_seed(0)
    body = L.Body("efficientnet_b4").eval()
    net = torchvision.models.efficientnet_b4().eval()
    net.features.load_state_dict(dict(zip(net.features.state_dict(), body.state_dict().values())))
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(body(x)[-1], net.features(L.GreyInput()(x)), atol=1e-4)


def test_group_norm_in_every_resnet_and_nowhere_else():
    with torch.device("meta"):
        for name in L.BODIES:
            if "resnet" in name:
                assert not any(isinstance(m, nn.BatchNorm2d) for m in L.Body(name, norm="group").modules())
            else:
                with pytest.raises(CxrError, match="group"):
                    L.Body(name, norm="group")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "efficientnet_b4", "small-resnet"])
def test_a_finer_last_map_has_the_same_weights(name):
    with torch.device("meta"):
        fine, own = L.Body(name, stride=8).eval(), L.Body(name)
        assert fine(torch.rand(1, 1, 64, 64))[-1].shape[-2:] == (8, 8) and fine.strides[-2:] == (8, 8)
        assert {k: v.shape for k, v in fine.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}


def test_blur_takes_no_body_without_residual_blocks():
    with pytest.raises(CxrError, match="no residual block"):
        L.blur_pool(L.Body("small-densenet"))
    with pytest.raises(CxrError, match="even"):
        L.blur_pool(L.Body("small-resnet"), 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("filt_size", [3, 5, 7])
def test_blur_keeps_a_constant_and_the_size_of_a_strided_convolution(size, filt_size):
    y = L.Blur(2, filt_size, 2)(torch.ones(1, 2, size, size))
    assert y.shape[-1] == (size + 1) // 2 and torch.allclose(y, torch.ones_like(y))


def test_blurred_bodies_run_and_learn():
    for name in ("resnet18", "small-resnet"):
        body = L.blur_pool(L.Body(name))
        assert [m.shape[-1] for m in body(torch.rand(2, 1, 64, 64))] == [64 // s for s in body.strides]
        body(torch.rand(2, 1, 40, 72))[-1].sum().backward()
        assert all(p.grad is not None for p in body.parameters())


@pytest.mark.parametrize("name", ["small-resnet", "small-densenet"])
def test_a_small_body_learns_from_labels_alone_what_and_where(name):
    torch.manual_seed(0)
    y = torch.rand(64, 2) < 0.5
    place = torch.randint(1, 6, (64, 2, 2))  # row, column of a patch, in cells of 16
    x = torch.rand(64, 1, 128, 128) * 0.3
    for i, k in y.nonzero().tolist():  # class 0 is a grey square, class 1 a striped one
        row, col = (place[i, k] * 16).tolist()
        x[i, 0, row : row + 20 : (4 if k else 1), col : col + 20] += 0.7 if k else 0.5
    body = L.Body(name)
    head = L.Classifier(body.channels[-1], n_classes=2)
    opt = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(64).split(32):
            opt.zero_grad()
            L.bce(head(body(x[rows])[-1]).logits, y[rows]).backward()
            opt.step()
    with torch.no_grad():
        out = head(body(x)[-1])
    assert ((out.logits > 0) == y).float().mean() > 0.95
    found = [divmod(out.maps[i, k].argmax().item(), 8) for i, k in y.nonzero().tolist()]
    true = [place[i, k].tolist() for i, k in y.nonzero().tolist()]
    hits = [-1 <= r - tr <= 2 and -1 <= c - tc <= 2 for (r, c), (tr, tc) in zip(found, true)]
    assert np.mean(hits) > 0.9


def test_output_passes_through_fabric():
    from lightning_utilities.core.apply_func import apply_to_collection

    out = L.Output(torch.zeros(1, 2), torch.zeros(1, 2, 3, 3), {"boxes": torch.ones(1)})
    half = apply_to_collection(out, torch.Tensor, lambda t: t.half())
    assert isinstance(half, L.Output) and half.extras["boxes"].dtype == torch.float16
    bare = apply_to_collection(L.Output(*out[:2]), torch.Tensor, lambda t: t.half())
    assert bare.logits.dtype == torch.float16 and not bare.extras
