"What the notebook of `bodies` cannot say: weights without a network, every body, every blur."

import re
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import DownsampleConv, PreActBasic, resnetv2_50
from torch import nn

from cxr_book import bodies as B
from cxr_book import layers as L
from cxr_book.core import CxrError

torch.set_num_threads(1)
V2 = ["small-resnetv2", "resnetv2-50"]


def test_a_body_loads_its_own_file_and_gives_the_same_maps(tmp_path):
    body = B.Body("small-resnet")
    file = L.save_weights(body, tmp_path / "body.safetensors", {"seed": 1})
    again = B.Body("small-resnet", weights=file)
    x = torch.rand(2, 1, 64, 64)
    assert torch.equal(body.eval()(x)[-1], again.eval()(x)[-1])
    with pytest.raises(CxrError, match=r"unexpected \(\d+\).*running_mean"):
        B.Body("small-resnet", norm="group", weights=file)


@pytest.mark.parametrize("name", ["small-resnet", "small-resnetv2"])
def test_blurring_renames_no_weight(name, tmp_path):
    body = B.Body(name)
    file = L.save_weights(body, tmp_path / "body.safetensors")
    before, after = B.blur_pool(B.Body(name, weights=file)).eval(), B.blur_pool(B.Body(name)).eval()
    L.load_strict(after, file)
    assert list(after.state_dict()) == list(body.state_dict())
    x = torch.rand(2, 1, 64, 64)
    assert torch.equal(before(x)[-1], after(x)[-1]) and not torch.allclose(after(x)[-1], body.eval()(x)[-1])


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
        B.Body("resnet18", weights="imagenet")
    assert str(hub / "resnet18-f37072fd.pth") in str(e.value) and "weights = None" in str(e.value)


def test_a_file_in_the_folder_is_used_also_in_densenets_old_form(hub):
    for name, file in (("resnet18", "resnet18-f37072fd.pth"), ("densenet121", "densenet121-a639ec97.pth")):
        net = torchvision.models.get_model(name).eval()
        state = net.state_dict()
        old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", k): v for k, v in state.items()}
        torch.save(old, hub / file, _use_new_zipfile_serialization=False)
        body = B.Body(name, weights="imagenet").eval()
        x = torch.rand(1, 1, 64, 64)
        with torch.no_grad():
            classes = (net.classifier if name == "densenet121" else net.fc)(body(x)[-1].mean((2, 3)))
            assert torch.allclose(classes, net(B.GreyInput()(x)), atol=1e-4)  # torchvision's own answer


def test_half_a_file_in_the_folder(hub):
    (hub / "resnet18-f37072fd.pth").write_bytes(b"half")
    with pytest.raises(CxrError, match="could not be read"):
        B.Body("resnet18", weights="imagenet")


@pytest.fixture
def timms(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"

    def download(repo, name):
        assert (repo, name) == ("timm/resnetv2_50.a1h_in1k", "model.safetensors")
        if not file.exists():
            raise OSError("no network")
        return str(file)

    monkeypatch.setattr(B, "hf_hub_download", download)
    return file


def test_timms_weights_are_safetensors_and_asked_for_by_name(timms):
    with pytest.raises(CxrError, match="no network") as e:
        B.Body("resnetv2-50", weights="imagenet")
    for part in ("timm/resnetv2_50.a1h_in1k", "HF_HOME", "weights = None"):
        assert part in str(e.value)
    torch.save({"w": torch.ones(1)}, timms)
    with pytest.raises(CxrError, match="could not be read.*pickle"):
        B.Body("resnetv2-50", weights="imagenet")


def test_timms_weights_give_timms_answer(timms):
    net = resnetv2_50()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01 * torch.randn_like(p))
    L.save_weights(net, timms)
    body, net = B.Body("resnetv2-50", weights="imagenet").eval(), net.eval()
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        want = net.forward_features((x.expand(-1, 3, -1, -1) - 0.5) / 0.5)
        assert torch.allclose(body(x)[-1], want, atol=1e-4)


# ---------------------------------------------------------------- bodies


def test_efficientnet_cut_is_torchvisions():
    torch.manual_seed(0)
    body = B.Body("efficientnet_b4").eval()
    net = torchvision.models.efficientnet_b4().eval()
    net.features.load_state_dict(dict(zip(net.features.state_dict(), body.state_dict().values())))
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(body(x)[-1], net.features(B.GreyInput()(x)), atol=1e-4)


def test_group_norm_in_every_resnet_and_nowhere_else():
    with torch.device("meta"):
        for name in B.BODIES:
            if "resnet" in name and name not in V2:
                assert not any(isinstance(m, nn.BatchNorm2d) for m in B.Body(name, norm="group").modules())
            else:
                with pytest.raises(CxrError, match="group"):
                    B.Body(name, norm="group")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "efficientnet_b4", "small-resnet", *V2])
def test_a_finer_last_map_has_the_same_weights(name):
    with torch.device("meta"):
        fine, own = B.Body(name, stride=8).eval(), B.Body(name)
        assert fine(torch.rand(1, 1, 64, 64))[-1].shape[-2:] == (8, 8) and fine.strides[-2:] == (8, 8)
        assert {k: v.shape for k, v in fine.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "small-resnet", "small-densenet", *V2])
def test_the_normalisation_is_the_bodys_own_unless_it_is_given(name):
    x = torch.rand(1, 1, 2, 2)
    for mean in (None, "imagenet", "symmetric"):
        want = mean or ("symmetric" if name in V2 else "imagenet")
        assert torch.equal(B.Body(name, mean=mean).grey(x), B.GreyInput(want)(x))


@pytest.mark.parametrize("name", list(B.BODIES))
def test_no_block_writes_into_the_map_before_it(name):
    body = B.Body(name).eval()
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        maps, y = body(x), body.stem(body.grey(x))
        for block, m in zip(body.blocks, maps):
            y = getattr(body, block)(y.clone())  # what this block does to its input, nobody sees
            assert torch.equal(y, m)


def test_leaky_relus_in_a_body_whose_norms_hold_their_own():
    body = B.replace_relu(B.Body("small-resnetv2"), lambda: nn.LeakyReLU(0.1))
    assert not any(isinstance(m, nn.ReLU) for m in body.modules())
    assert sum(isinstance(m, nn.LeakyReLU) for m in body.modules()) == 7  # two in each block, and the last
    assert body(torch.rand(2, 1, 64, 64))[-1].min() < 0


# ---------------------------------------------------------------- blur


def test_blur_takes_no_body_without_residual_blocks():
    with pytest.raises(CxrError, match="no residual block"):
        B.blur_pool(B.Body("small-densenet"))
    with pytest.raises(CxrError, match="even"):
        B.blur_pool(B.Body("small-resnet"), 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("filt_size", [3, 5, 7])
def test_blur_keeps_a_constant_and_the_size_of_a_strided_convolution(size, filt_size):
    y = B.Blur(2, filt_size, 2)(torch.ones(1, 2, size, size))
    assert y.shape[-1] == (size + 1) // 2 and torch.allclose(y, torch.ones_like(y))


def test_blurred_bodies_run_and_learn():
    for name in ("resnet18", "small-resnet", *V2):
        body = B.blur_pool(B.Body(name))
        assert [m.shape[-1] for m in body(torch.rand(2, 1, 64, 64))] == [64 // s for s in body.strides]
        body(torch.rand(2, 1, 40, 72))[-1].sum().backward()
        assert all(p.grad is not None for p in body.parameters())


def strided(module):
    return [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]


@pytest.mark.parametrize("name", ["resnet50", "small-resnet", *V2])
def test_every_stride_behind_the_stem_becomes_a_blur(name):
    with torch.device("meta"):
        body = B.Body(name).eval()
    sizes = [m.shape for m in body(torch.rand(1, 1, 72, 104, device="meta"))]
    before, keys = strided(body), list(body.state_dict())
    B.blur_pool(body)
    stem = [n for n in before if n.startswith("stem.")]
    blurs = [m for m in body.modules() if isinstance(m, B.BlurConv2d)]
    assert strided(body) == stem and len(stem) == 1
    assert len(blurs) == len(before) - len(stem) == 2 * (len(body.blocks) - 1)  # one on each path
    assert list(body.state_dict()) == keys
    assert [m.shape for m in body(torch.rand(1, 1, 72, 104, device="meta"))] == sizes


def blur(x):
    "Binomial, 3 x 3, reflected at the border, at every second position."
    w = torch.tensor([1.0, 2.0, 1.0]) / 4
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x.flatten(0, 1)[:, None], w.outer(w)[None, None], stride=2).unflatten(0, x.shape[:2])[:, :, 0]


def test_the_order_in_a_basic_pre_activation_block_is_zhangs():
    block = PreActBasic(32, 64, stride=2, bottle_ratio=1.0, conv_layer=create_conv2d, norm_layer=BatchNormAct2d, proj_layer=DownsampleConv).eval()
    weights = [c.weight.detach().clone() for c in (block.conv1, block.conv2, block.downsample.conv)]
    B.blur_pool(block)
    x = torch.randn(2, 32, 16, 16)
    with torch.no_grad():
        before = block.norm1(x)
        long = F.conv2d(before, weights[0], padding=1)  # at every position,
        long = F.conv2d(blur(block.norm2(long)), weights[1], padding=1)  # norm and ReLU, blur, the next convolution
        short = F.conv2d(blur(before), weights[2])
        assert torch.allclose(block(x), long + short, atol=1e-5)


def test_the_order_in_a_pre_activation_bottleneck_is_zhangs():
    block = resnetv2_50().stages[1].eval().blocks[0]
    parts = (block.conv1, block.conv2, block.conv3, block.downsample.conv)
    one, three, last, shortcut = [c.weight.detach().clone() for c in parts]
    B.blur_pool(block)
    x = torch.randn(1, 256, 8, 8)
    with torch.no_grad():
        before = block.norm1(x)
        long = F.conv2d(block.norm2(F.conv2d(before, one)), three, padding=1)
        long = F.conv2d(blur(block.norm3(long)), last)
        assert torch.allclose(block(x), long + F.conv2d(blur(before), shortcut), atol=1e-4)


@pytest.mark.parametrize("name", ["small-resnet", "small-densenet"])
def test_a_small_body_learns_from_labels_alone_what_and_where(name):
    torch.manual_seed(0)
    y = torch.rand(128, 2) < 0.5
    place = torch.randint(1, 6, (128, 2, 2))  # row, column of a patch, in cells of 16
    x = torch.rand(128, 1, 128, 128) * 0.3
    for i, k in y.nonzero().tolist():  # class 0 is a grey square, class 1 a striped one
        row, col = (place[i, k] * 16).tolist()
        x[i, 0, row : row + 20 : (4 if k else 1), col : col + 20] += 0.7 if k else 0.5
    body = B.Body(name)
    head = L.Classifier(body.channels[-1], n_classes=2)
    opt = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(128).split(32):
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
