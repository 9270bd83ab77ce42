"Chapter 14: attention and weighting against plain float64 versions, what learns, and the trials of the idea."

import copy
import json
import os
from functools import cache

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from steps import step

from cxr_book import weighting
from cxr_book.bodies import BODIES, Body, count_parameters
from cxr_book.classification import patient_weights
from cxr_book.controls import grad_cam
from cxr_book.core import FINDINGS, NO_FINDING, PRESETS, CxrError
from cxr_book.course import plan
from cxr_book.data import read
from cxr_book.drawing import draw_image, enclosing_box
from cxr_book.evaluation import Predictions, pairs_of, predict
from cxr_book.guided import ExcitedClassifier, GuidedNet
from cxr_book.layers import bce, load_strict, save_weights
from cxr_book.learner import Learner
from cxr_book.loader import Batch
from cxr_book.localization import PAPER_RULES, iou
from cxr_book.phantom import PhantomSettings, draw_dataset
from cxr_book.segmentation import Segmenter
from cxr_book.splits import leaks, official_split
from cxr_book.study import PlainClassifier, open_study
from cxr_book.weighting import (
    KINDS,
    ORGANS,
    InsideNet,
    MultiScaleAttention,
    WeightedNet,
    WeightingSettings,
    attend,
    compare_arms,
    draw_moved,
    inside_maps,
    methods,
    move_out,
    oracle_boxes,
    oracle_iou,
    organ_cells,
    stage_of,
)

torch.set_num_threads(1)
SETTINGS = WeightingSettings.from_preset("smoke", pretrain_epochs=0, valid=0.3)
SMALL = [name for name in BODIES if name.startswith("small")]
LARGE = [name for name in BODIES if not name.startswith("small")]
DRAWN = PhantomSettings(size=64, contrast=3.0, mildest=0.6, variety=0.3)
NOTHING, PLAIN = dict(weigh="nothing"), dict(weigh="nothing", attention=False)
VARIANTS = [{}, NOTHING, PLAIN, dict(weigh="pixels"), dict(mask="threshold"), dict(over="mask"), dict(squash=True)]


def batch_of(n=4, side=64, seed=0, masks=False):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, side, side, generator=g), (torch.rand(n, 14, generator=g) < 0.3).float()
    planes = (torch.rand(n, 3, 8, 8, generator=g) < 0.3).float().repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
    return Batch(x, y, torch.arange(n), torch.eye(3).expand(n, 3, 3), planes if masks else None)


@cache
def segmenter_of():
    "A segmenter that has learnt nothing and calls about half of the pixels organs."
    torch.manual_seed(1)
    segmenter = Segmenter(SETTINGS.segmentation).eval()
    with torch.no_grad():
        segmenter.net.out.bias -= segmenter(batch_of().x).amax(1).median()
    return segmenter


def net_of(like=None, **changes):
    "A network, with the weights of another one where there are such."
    torch.manual_seed(0)
    net = WeightedNet(SETTINGS.but(**changes), copy.deepcopy(segmenter_of()))
    if like:
        net.load_state_dict({**net.state_dict(), **{k: v for k, v in like.state_dict().items() if k in net.state_dict()}})
    return net.eval()


@cache
def warm_weights(attention):
    net = net_of(attention=attention)
    with torch.no_grad():
        net.body.train()(batch_of(8, seed=3).x)
    return net


def warmed(**changes):
    "A network whose moving statistics have seen a batch, so that evaluation is not at the start."
    return net_of(warm_weights(changes.get("attention", True)), **changes)


def left_half(n=4, side=64):
    organs = torch.zeros(n, 1, side, side)
    organs[..., : side // 2] = 1
    return organs


# ---------------------------------------------------------------- settings


def test_the_defaults_are_the_papers():
    s = WeightingSettings()
    assert s == WeightingSettings.from_preset("paper")
    assert (s.body, s.second_body, s.weights, s.pretrain_epochs) == ("densenet121", "resnet50", "imagenet", 0)
    assert (s.lr, s.weight_decay, s.epochs, s.batch_size, s.schedule, s.valid) == (1e-3, 1e-4, 50, 512, "constant", 0.1)
    assert s.image_size == 256 and s.augment.out_size == s.image_size * s.augment.centre_crop == 224 and not s.augment.random
    assert (s.attention, s.weigh, s.mask, s.over, s.squash) == (True, "features", "fraction", "image", False)
    assert s.segmentation.structures == ORGANS and s.segmentation.bce == 0 and s.segmentation.image_size == 256
    stage = stage_of(s)
    assert (stage.optimizer, stage.lr, stage.weight_decay, stage.epochs, stage.schedule) == ("adam", 1e-3, 1e-4, 50, "constant")
    assert stage.keep == "best" and stage.monitor == "auroc" and stage.clip is None and stage.ema is None


def test_presets_differ_and_survive_json():
    presets = [WeightingSettings.from_preset(name) for name in PRESETS]
    assert len({s.but(preset="paper").digest for s in presets}) == len({s.digest for s in presets}) == 3
    for s in presets:
        assert WeightingSettings(**json.loads(json.dumps(s.model_dump(mode="json")))) == s
        assert s.segmentation.bce == 0 and s.segmentation.image_size % 2**s.segmentation.depth == 0


@pytest.mark.parametrize("change", [dict(weigh="feature"), dict(mask="share"), dict(over="organs"), dict(epochs=0), dict(lr=0),
                                    dict(guided_epochs=0), dict(trial_images=7), dict(weight_decay=-1), dict(squash="perhaps"),
                                    dict(segmentation=dict(widht=3)), dict(atention=False)])  # fmt: skip
def test_impossible_settings_are_refused(change):
    with pytest.raises(CxrError, match=next(iter(change))):
        SETTINGS.but(**change)


# ---------------------------------------------------------------- multi-scale attention


def plain_attention(x, module):
    "Pixel by pixel in float64: convolutions as sums over a window, maxima and means over channels, one sigmoid."

    def convolve(x, w):
        (n, _, h, wide), k = x.shape, w.shape[-1]
        padded = np.zeros((*x.shape[:2], h + k - 1, wide + k - 1))
        padded[:, :, k // 2 : k // 2 + h, k // 2 : k // 2 + wide] = x
        out = np.zeros((n, len(w), h, wide))
        for b in range(n):
            for o in range(len(w)):
                for i in range(h):
                    for j in range(wide):
                        out[b, o, i, j] = (padded[b, :, i : i + k, j : j + k] * w[o]).sum()
        return out

    x = x.double().numpy()
    views = [x] + [convolve(x, conv.weight.detach().double().numpy()) for conv in module.scales]
    six = np.stack([f(v) for v in views for f in (lambda v: v.max(1), lambda v: v.sum(1) / v.shape[1])], 1)
    gate = 1 / (1 + np.exp(-convolve(six, module.join.weight.detach().double().numpy())))
    return x * gate, gate


def test_attention_is_the_released_one():
    torch.manual_seed(0)
    module = MultiScaleAttention()
    assert count_parameters(module) == 3 * 3 * 25 + 3 * 3 * 81 + 6 * 9 == 1008
    assert [tuple(p.shape) for p in module.parameters()] == [(3, 3, 5, 5), (3, 3, 9, 9), (1, 6, 3, 3)]
    for shape in ((2, 3, 11, 8), (1, 3, 3, 4)):  # wider and narrower than the kernels
        x = torch.randn(shape) * 2
        weighed, gate = plain_attention(x, module)
        with torch.no_grad():
            assert np.allclose(module(x), weighed, atol=1e-5) and np.allclose(module.gate(x), gate, atol=1e-6)
            exact = copy.deepcopy(module).double()
            assert np.allclose(exact(x.double()), weighed, atol=1e-12) and exact.gate(x.double()).shape == (shape[0], 1, *shape[2:])


def test_attention_lies_between_0_and_1():
    torch.manual_seed(0)
    module = MultiScaleAttention()
    for x in (torch.zeros(1, 3, 9, 9), torch.full((1, 3, 9, 9), 1e4), torch.randn(2, 3, 16, 16) * 100):
        gate = module.gate(x)
        assert (gate >= 0).all() and (gate <= 1).all() and (gate.amin() < 1 or not x.any())
    assert (module.gate(torch.zeros(1, 3, 9, 9)) == 0.5).all()  # no bias


def test_gradients_of_the_attention():
    torch.manual_seed(0)
    module = MultiScaleAttention(channels=2, scales=(3, 5)).double()
    x = torch.randn(1, 2, 4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


@pytest.mark.parametrize("name", SMALL)
def test_attention_in_front_of_a_small_body(name, monkeypatch):
    torch.manual_seed(0)
    plain = Body(name)
    x = batch_of(2).x
    attended = attend(copy.deepcopy(plain))
    assert count_parameters(attended) == count_parameters(plain) + 1008
    maps = attended(x)
    assert [m.shape[1] for m in maps] == list(plain.channels) == list(attended.channels)
    assert [64 // m.shape[-1] for m in maps] == list(plain.strides) == list(attended.strides)
    assert not torch.allclose(maps[0], copy.deepcopy(plain)(x)[0], atol=1e-3)
    maps[-1].square().sum().backward()
    attention = [p for m in attended.modules() if isinstance(m, MultiScaleAttention) for p in m.parameters()]
    assert len(attention) == 3 and all(p.grad.abs().sum() > 0 for p in attention)
    monkeypatch.setattr(MultiScaleAttention, "gate", lambda self, x: torch.ones_like(x[:, :1]))
    for mode in (True, False):  # the training step moves the same statistics
        a, b = attend(copy.deepcopy(plain)).train(mode), copy.deepcopy(plain).train(mode)
        assert all(torch.equal(p, q) for p, q in zip(a(x), b(x)))
        assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())


@pytest.mark.parametrize("name", LARGE)
def test_attention_in_front_of_a_large_body(name):
    body = Body(name)
    before, channels, strides = count_parameters(body), body.channels, body.strides
    assert attend(body) is body and count_parameters(body) == before + 1008
    assert (body.channels, body.strides) == (channels, strides)
    assert body.grey(torch.rand(1, 1, 12, 10)).shape == (1, 3, 12, 10)


# ---------------------------------------------------------------- masks of cells


def test_cells_by_hand():
    organs = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]]).float().view(1, 1, 4, 4)
    assert organ_cells(organs, (2, 2)).tolist() == [[[[1, 0.25], [0.5, 0]]]]
    assert organ_cells(organs, (2, 2), "threshold").tolist() == [[[[1, 0], [1, 0]]]]
    assert organ_cells(organs, (4, 4)).equal(organs) and organ_cells(organs, (1, 2)).tolist() == [[[[0.75, 0.125]]]]


@pytest.mark.parametrize("side, cells", [(14, 4), (12, 5), (20, 3), (16, 4), (7, 7)])
def test_cells_are_means_of_what_they_cover(side, cells):
    organs = (torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(side)) < 0.5).float()
    share = organ_cells(organs, (cells, cells))
    for b in range(3):
        for i in range(cells):
            for j in range(cells):
                y, x = (slice(k * side // cells, -(-(k + 1) * side // cells)) for k in (i, j))
                inside = organs[b, 0, y, x].double()
                exact = inside.sum().item() / inside.numel()
                assert share[b, 0, i, j].item() == pytest.approx(exact, abs=1e-7)
                if abs(exact - 0.5) > 1e-6 or side % cells == 0:
                    assert organ_cells(organs, (cells, cells), "threshold")[b, 0, i, j] == (exact >= 0.5)


@pytest.mark.parametrize("cell", [2, 14, 32])
def test_a_half_is_inside(cell):
    organs = torch.zeros(1, 1, cell, 2 * cell)
    organs.view(cell, 2 * cell)[: cell // 2] = 1
    organs[0, 0, 0, -1] = 0  # one pixel less than a half
    assert organ_cells(organs, (1, 2), "threshold").flatten().tolist() == [1, 0]


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", [{}, dict(mask="threshold"), dict(over="mask"), dict(weigh="pixels"), dict(squash=True)])
def test_with_all_cells_inside_nothing_is_weighed(change, training):
    x, net = batch_of().x, warmed(**change)
    plain = net_of(net, **(NOTHING | {k: v for k, v in change.items() if k == "squash"})).train(training)
    out, other = net.train(training)(x, torch.ones_like(x)), plain(x)
    assert torch.equal(out.logits, other.logits) and torch.equal(out.maps, other.maps)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in plain.state_dict().items())  # statistics too


class Given(torch.nn.Module):
    "A body that gives the same maps for every image."

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return [self.features, self.features]


@pytest.mark.parametrize("change", [{}, dict(mask="threshold"), dict(over="mask"), dict(squash=True)])
def test_nothing_outside_is_seen(change):
    x, net, organs = batch_of().x, warmed(**change), left_half()
    organs[1] = organs[1].flip(2)
    with torch.no_grad():
        out = net(x, organs)
        F_l = out.extras["features"]
        outside = (organ_cells(organs, F_l.shape[2:]) == 0).expand_as(F_l)
        assert outside.any() and (F_l[outside] == 0).all() and (F_l[~outside] != 0).any()
        seen = net.body(x)[-1]
        changed = copy.deepcopy(net)
        for noise in (torch.randn_like(seen), torch.full_like(seen, 1e6)):
            changed.body = Given(torch.where(outside, noise, seen))
            again = changed(x, organs)
            assert torch.equal(again.logits, out.logits) and torch.equal(again.maps, out.maps)
        changed.body = Given(torch.where(outside, seen, noise))  # and what is inside counts
        assert not torch.allclose(changed(x, organs).logits, out.logits, atol=1e-3)


@pytest.mark.parametrize("change", [{}, dict(mask="threshold"), dict(over="mask"), dict(squash=True)])
def test_without_lungs_and_heart_only_the_bias_speaks(change):
    net, x = warmed(**change), batch_of().x
    torch.nn.init.normal_(net.classifier.conv.bias)
    with torch.no_grad():
        out = net(x, torch.zeros_like(x))
    bias = net.classifier.conv.bias
    assert torch.equal(out.logits, bias.expand(4, 14)) and torch.equal(out.maps, bias.view(1, 14, 1, 1).expand_as(out.maps))


@pytest.mark.parametrize("training", [False, True])
def test_pixels_are_zeroed_in_front_of_everything(training):
    net, x = warmed(weigh="pixels"), batch_of().x
    plain = net_of(net, **NOTHING).train(training)
    organs = left_half()
    out, other = net.train(training)(x, organs), plain(x * organs)
    assert torch.equal(out.logits, other.logits) and torch.equal(out.maps, other.maps)
    assert not torch.allclose(out.logits, net_of(net, **NOTHING).train(training)(x).logits, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_without_attention_and_weighting_it_is_the_plain_classifier(training):
    net, plain, x = warmed(**PLAIN), PlainClassifier(SETTINGS.body), batch_of().x
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()] and net.segmenter is None
    plain.load_state_dict(net.state_dict())
    out, other = net.train(training)(x), plain.train(training)(x)
    assert torch.equal(out.logits, other.logits) and torch.equal(out.maps, other.maps)
    assert torch.equal(out.extras["features"], other.extras["features"]) and torch.equal(out.extras["finer"], other.extras["finer"])
    batch = batch_of(masks=True)
    assert torch.equal(net.loss(batch, "train")["loss"], plain.loss(batch, "train")["loss"])


@pytest.mark.parametrize("change", VARIANTS)
def test_the_answer_is_that_of_plain_sums(change):
    x, net, organs = batch_of(2).x, warmed(**change), batch_of(2, masks=True, seed=5).masks[:, :1]
    s = net.settings
    with torch.no_grad():
        out = net(x, organs)
        given = net.body(x * organs if s.weigh == "pixels" else x)[-1].double()
    w, bias = (p.detach().double().flatten(1) if p.ndim > 1 else p.detach().double() for p in net.classifier.conv.parameters())
    h, cell = given.shape[-1], 64 // given.shape[-1]
    for b in range(2):
        total, size, pooled, maps = 0.0, 0.0, torch.zeros(given.shape[1]).double(), torch.zeros(14, h, h).double()
        for i in range(h):
            for j in range(h):
                f = given[b, :, i, j].sigmoid() if s.squash else given[b, :, i, j]
                share = organs[b, 0, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].double().mean().item()
                share = 1.0 if s.weigh != "features" else float(share >= 0.5) if s.mask == "threshold" else share
                total, size, pooled = total + share, size + 1, pooled + share * f
                maps[:, i, j] = w @ (share * f)
        over = total if s.over == "mask" and s.weigh == "features" else size
        assert 0 < total < size or s.weigh != "features"
        assert torch.allclose(out.logits[b].double(), w @ pooled / over + bias, atol=1e-5)
        assert torch.allclose(out.maps[b].double(), maps * size / over + bias[:, None, None], atol=1e-4)


# ---------------------------------------------------------------- where the masks come from


def test_organs_are_what_the_segmenter_says():
    net, x = net_of(), batch_of(seed=7).x
    for part in (x, x[..., 4:-4, 4:-4], x[..., :48, :]):  # also the sizes of a crop
        found = net.organs(part)
        with torch.no_grad():
            plain = (net.segmenter(part) > 0).any(1, keepdim=True).float()
        assert torch.equal(found, plain) and found.shape == part.shape and 0.1 < found.mean() < 0.9
    assert torch.equal(net(x).logits, net(x, net.organs(x)).logits) and torch.equal(net(x).extras["organs"], net.organs(x))


def test_organs_of_larger_images_are_found_at_the_segmenters_scale():
    net = net_of(image_size=128, segmentation=SETTINGS.segmentation.model_dump())
    for side, small in ((128, 64), (112, 56)):
        x = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(side))
        found, seen = net.organs(x), F.avg_pool2d(x, side // small)
        with torch.no_grad():
            plain = (net.segmenter(seen) > 0).any(1, keepdim=True).float()
        same = (found == plain.repeat_interleave(2, 2).repeat_interleave(2, 3)).float().mean()
        assert same > 0.999 and set(found.unique().tolist()) == {0, 1}
    for shape in ((1, 1, 100, 100), (1, 1, 120, 90)):  # sides that do not divide
        assert net.organs(torch.rand(shape)).shape == shape


def test_masks_of_the_batch_are_taken_for_the_segmenters(monkeypatch):
    net, batch = net_of(), batch_of(masks=True)
    union = torch.zeros(4, 1, 64, 64)
    for k in range(3):
        union[:, 0][batch.masks[:, k] > 0] = 1
    own = net.loss(batch._replace(masks=None), "train")
    assert torch.equal(own["loss"], bce(net(batch.x, net.organs(batch.x)).logits, batch.y))

    def never(x):
        raise AssertionError("segmented")

    monkeypatch.setattr(net, "organs", never)
    losses = net.loss(batch, "train")
    assert torch.equal(losses["logits"], net(batch.x, union).logits) and not losses["logits"].requires_grad
    p = losses["logits"].double().sigmoid()
    printed = -(batch.y * p.log() + (1 - batch.y) * (1 - p).log()).sum(1) / 14  # Eq. 1
    assert losses["loss"].item() == pytest.approx(printed.mean().item(), abs=1e-6) and losses["loss"] != own["loss"]
    with pytest.raises(AssertionError, match="segmented"):
        net.loss(batch._replace(masks=None), "train")


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("change", [{}, dict(weigh="pixels"), dict(over="mask"), NOTHING])
def test_the_segmenter_never_learns(change, masks):
    net = net_of(**change)
    (stage,) = net.stages()
    assert (stage.lr, stage.weight_decay, stage.epochs) == (SETTINGS.lr, SETTINGS.weight_decay, SETTINGS.epochs)
    losses, changed = step(net, batch_of(masks=masks), stage)
    assert changed == {"body", "classifier"} and torch.isfinite(losses["loss"])
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (net.body, net.classifier) for p in m.parameters())
    if net.segmenter:
        assert all(p.grad is None and not p.requires_grad for p in net.segmenter.parameters())
        assert not any(m.training for m in net.segmenter.modules()) and net.body.training


@pytest.mark.parametrize("change", VARIANTS)
def test_weights_come_back_with_the_segmenter(change, tmp_path):
    net, x = warmed(**change), batch_of().x
    torch.manual_seed(9)
    again = WeightedNet(net.settings)
    load_strict(again, save_weights(net, tmp_path / "net.safetensors"))
    assert torch.equal(again.eval()(x).logits, net(x).logits)
    assert (net.settings.weigh == "nothing") != any(k.startswith("segmenter.") for k in again.state_dict())


def test_a_file_of_a_plain_body_serves_behind_the_attention(tmp_path):
    plain = Body(SETTINGS.body)
    net = net_of(weights=str(save_weights(plain, tmp_path / "body.safetensors")))
    own = net.body.state_dict()
    assert all(torch.equal(own[k], v) for k, v in plain.state_dict().items()) and len(own) == len(plain.state_dict()) + 3


def test_grad_cam_sees_nothing_outside_either():
    net, x = warmed(), batch_of().x
    net.train()
    net.segmenter.eval()
    modes = [m.training for m in net.modules()]
    maps = grad_cam(net, x)
    assert [m.training for m in net.modules()] == modes
    out = net.eval()(x)
    h, bias = out.maps.shape[-1], net.classifier.conv.bias.view(1, 14, 1, 1)
    assert torch.allclose(maps, ((out.maps - bias) / h**2).relu(), atol=1e-6)  # a linear classifier behind a mean
    cells = organ_cells(net.organs(x), (h, h)).expand_as(maps)
    assert maps.shape == (4, 14, h, h) and (maps[cells == 0] == 0).all() and maps.any()


@pytest.mark.parametrize("change", VARIANTS)
def test_maps_of_the_inside_are_a_plain_loops(change):
    net, x = warmed(**change), batch_of().x
    reader = InsideNet(net.settings, copy.deepcopy(segmenter_of())).eval()
    reader.load_state_dict(reader.state_dict() | net.state_dict())
    with torch.no_grad():
        out, own, organs = reader(x), net(x), reader.organs(x).double().numpy()[:, 0]
    assert torch.equal(out.logits, own.logits) and not torch.equal(out.maps, own.maps)
    features, conv = own.extras["unweighed"].double().numpy(), net.classifier.conv
    weight, bias, h = conv.weight.detach().double().numpy()[:, :, 0, 0], conv.bias.detach().double().numpy(), out.maps.shape[-1]
    inside = organs.reshape(len(x), h, 64 // h, h, 64 // h).mean((2, 4)) >= 0.5
    assert inside.any((1, 2)).all() and not inside.all()
    for maps, f, on in zip(out.maps.numpy(), features, inside):
        for k in range(14):
            says = np.tensordot(weight[k], f, 1) + bias[k]
            assert np.allclose(maps[k], np.where(on, says, says[on].min()), rtol=0, atol=1e-5)


def test_without_an_inside_nothing_is_hot():
    maps = torch.randn(2, 3, 4, 4)
    nowhere = torch.zeros(2, 1, 16, 16)
    assert not inside_maps(maps, nowhere).any()
    nowhere[1, :, :4, :4] = 1  # one cell of the second image
    found = inside_maps(maps, nowhere)
    assert not found[0].any() and torch.equal(found[1], maps[1, :, :1, :1].expand(3, 4, 4))


def test_a_network_read_inside_stands_alone(study):
    segmenter = segmenter_of()
    nets = {"attention": warmed(**NOTHING), "weighted": warmed()}
    weighting.read_inside(study, segmenter, nets)
    found = weighting.read_inside(study, segmenter, nets)  # from the folders
    assert [*found] == ["attention-inside", "weighted-inside"]
    for name, net in found.items():
        again = methods(study.settings)[name]()
        load_strict(again, study.run.folder / name / "weights.safetensors")
        x = batch_of().x
        assert torch.equal(again.eval()(x).maps, net.eval()(x).maps) and torch.equal(again(x).logits, nets[name[:-7]](x).logits)


@pytest.mark.parametrize("change", VARIANTS)
def test_bf16_gives_float32_logits(change):
    net, x = warmed(**change), batch_of().x
    with torch.no_grad():
        organs = net.organs(x) if net.segmenter else None
        exact = net(x, organs).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x, organs)
            if net.segmenter:
                found = net(x).extras["organs"]
                assert set(found.unique().tolist()) == {0, 1} and (found == organs).float().mean() > 0.95
    assert out.logits.dtype == out.maps.dtype == torch.float32 and (out.logits - exact).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.train().loss(batch_of(masks=True), "train")["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in net.body.parameters())


# ---------------------------------------------------------------- the methods

ONE_STAGE = ("weighted", "weighted-inside", "attention", "attention-inside", "chexnet", "dcnn", "dcnn-attention", "senet")
PARTS = {name: [{"body", "classifier"}] for name in ONE_STAGE}
PARTS["agcnn"] = [{"whole"}, {"local"}, {"fusion"}]


def test_the_methods_are_those_of_the_paper():
    segmenter = segmenter_of()
    assert methods(SETTINGS).keys() == PARTS.keys()
    nets = {name: build() for name, build in methods(SETTINGS, segmenter=segmenter).items()}
    attends = {n for n, net in nets.items() if any(isinstance(m, MultiScaleAttention) for m in net.modules())}
    inside = {"weighted-inside", "attention-inside"}
    assert attends == {"weighted", "attention", "dcnn-attention"} | inside
    assert {n for n, net in nets.items() if getattr(net, "segmenter", None) is segmenter} == {"weighted"} | inside
    bodies = {n: {m.name for m in net.modules() if isinstance(m, Body)} for n, net in nets.items()}
    assert bodies == {n: {SETTINGS.second_body if n.startswith("dcnn") else SETTINGS.body} for n in nets}
    assert type(nets["senet"]) is ExcitedClassifier and type(nets["agcnn"]) is GuidedNet
    assert count_parameters(nets["attention"]) == count_parameters(nets["chexnet"]) + 1008
    assert count_parameters(nets["dcnn-attention"]) == count_parameters(nets["dcnn"]) + 1008
    longer = SETTINGS.but(guided_epochs=3, epochs=7, lr=0.02)
    assert [t.epochs for t in methods(longer)["agcnn"]().stages()] == [3, 3, 3] and methods(longer)["agcnn"]().stages()[0].lr == 0.02
    assert [t.epochs for t in methods(longer)["weighted"]().stages()] == [7]


@pytest.mark.parametrize("name", PARTS)
def test_what_learns_in_which_stage(name):
    torch.manual_seed(0)
    net, batch = methods(SETTINGS, segmenter=segmenter_of())[name](), batch_of()
    stages = net.stages() if hasattr(net, "stages") else [stage_of(SETTINGS)]
    for stage, learns in zip(stages, PARTS[name], strict=True):
        losses, changed = step(net, batch, stage)
        assert changed == learns and torch.isfinite(losses["loss"])
    with torch.no_grad():
        out = net.eval()(batch.x)
    assert out.logits.shape == (4, 14) and out.maps.shape[:2] == (4, 14)
    assert out.logits.isfinite().all() and out.maps.isfinite().all() and out.logits.dtype == torch.float32


def test_each_body_starts_with_its_own_weights(tmp_path):
    first, second = Body(SETTINGS.body), Body(SETTINGS.second_body)
    files = [str(save_weights(b, tmp_path / f"{b.name}.safetensors")) for b in (first, second)]
    s, t = (SETTINGS.but(weights=f) for f in files)
    for name, build in methods(s, t, segmenter_of()).items():
        bodies = [m for m in build().modules() if isinstance(m, Body)]
        for body in bodies:
            like = second if name.startswith("dcnn") else first
            assert body.name == like.name and len(bodies) == 1 + (name == "agcnn")
            own = {k.replace(".block.", "."): v for k, v in body.state_dict().items()}  # of an excited body
            assert all(torch.equal(own[k], v) for k, v in like.state_dict().items())


# ---------------------------------------------------------------- the oracle


def slow_boxes(heat, box):
    "All boxes that the oracle may choose from, (m, 4), and the one of the piece that holds the global peak."
    h, w = heat.shape
    level = np.floor(heat * np.float32(255)).astype(int)
    tops = np.zeros((h, w), bool)
    for i in range(h):
        for j in range(w):
            near = level[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3]
            tops[i, j] = level[i, j] == near.max() > near.min()
    grown = np.zeros((h, w), bool)
    for i, j in zip(*np.nonzero(tops)):
        for p in range(h):
            for q in range(w):
                grown[p, q] |= abs(p - i) + abs(q - j) <= 5
    labels, n = ndimage.label(grown)
    size, tried, top = box[2:] - box[:2], [], labels.flat[level.argmax()]
    for k in range(1, n + 1):
        y, x = np.nonzero(labels == k)
        mass = level[y, x].sum()
        centre = np.array([(level[y, x] * (x + 0.5)).sum() / mass / w, (level[y, x] * (y + 0.5)).sum() / mass / h])
        corner = np.maximum(centre - size / 2, 0)
        tried.append([*corner, *(corner + size)])
    tried = np.array(tried or [[0, 0, *size]])
    return tried, tried[max(top - 1, 0)]


def smooth_maps(n, side, seed, sigma=1.5):
    rng = np.random.default_rng(seed)
    heat = np.stack([cv2.GaussianBlur(h, (0, 0), sigma) for h in rng.random((n, side, side)).astype(np.float32)])
    heat = (heat - heat.min((1, 2), keepdims=True)) / np.ptp(heat, (1, 2))[:, None, None]
    corner, size = rng.uniform(0, 0.6, (n, 2)), rng.uniform(0.05, 0.4, (n, 2))
    return heat, np.concatenate([corner, corner + size], 1)


@pytest.mark.parametrize("side, sigma", [(26, 1.2), (40, 2.0)])
def test_the_oracle_is_that_of_plain_loops(side, sigma):
    heat, boxes = smooth_maps(10, side, side, sigma)
    placed, pieces = oracle_boxes(heat, boxes), 0
    for h, box, found in zip(heat, boxes, placed):
        tried, peak = slow_boxes(h, box)
        pieces += len(tried)
        values = iou(tried, box)
        assert iou(found[None], box)[0] == pytest.approx(values.max(), abs=1e-9)
        assert np.abs(tried - found).max(1).min() < 1e-9  # one of those that may be chosen
        assert values.max() >= iou(peak[None], box)[0] - 1e-12
    assert pieces > len(heat) + 3
    assert np.allclose(placed[:, 2:] - placed[:, :2], boxes[:, 2:] - boxes[:, :2]) and (placed >= 0).all()


def test_the_oracle_knows_size_and_place():
    box, n = np.array([[0.35, 0.4, 0.65, 0.6]]), 40
    heat = np.zeros((1, n, n), np.float32)
    heat[0, 3, 3], heat[0, 20, 20] = 1.0, 0.5  # the higher peak is elsewhere
    found = oracle_boxes(heat, box)
    shift = 0.5 / n
    assert np.allclose(found, box + shift) and iou(found, box + shift)[0] == pytest.approx(1)
    assert iou(found, box)[0] == pytest.approx((0.3 - shift) * (0.2 - shift) / (0.12 - (0.3 - shift) * (0.2 - shift)))
    heat[0, 20, 20] = 0
    assert iou(oracle_boxes(heat, box), box)[0] == 0  # the one peak there is


def test_the_oracle_of_apart_peaks_beats_the_global_peak():
    rng = np.random.default_rng(0)
    for _ in range(20):
        heat = np.zeros((1, 60, 60), np.float32)
        for y, x in rng.permutation([(i, j) for i in range(7, 60, 15) for j in range(7, 60, 15)])[:6]:
            heat[0, y, x] = rng.uniform(0.2, 1)
        corner, size = rng.uniform(0, 0.6, 2), rng.uniform(0.1, 0.4, 2)
        box = np.array([[*corner, *(corner + size)]])
        y, x = np.unravel_index(heat[0].argmax(), (60, 60))
        at = np.maximum(np.array([x + 0.5, y + 0.5]) / 60 - size / 2, 0)
        assert iou(oracle_boxes(heat, box), box)[0] >= iou(np.array([[*at, *(at + size)]]), box)[0] - 1e-9


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_without_a_peak_the_box_lies_in_the_corner(value):
    heat, box = np.full((2, 30, 30), value, np.float32), np.array([[0.5, 0.5, 0.8, 0.7], [0.1, 0.0, 0.4, 0.9]])
    assert np.allclose(oracle_boxes(heat, box), [[0, 0, 0.3, 0.2], [0, 0, 0.3, 0.9]])


def test_a_box_at_the_border_keeps_its_size():
    heat = np.zeros((2, 32, 32), np.float32)
    heat[0, 1, 2], heat[1, 30, 29] = 1, 1
    boxes = np.array([[0.0, 0.0, 0.5, 0.4], [0.5, 0.6, 1.0, 1.0]])
    found = oracle_boxes(heat, boxes)
    assert np.allclose(found[0], boxes[0]) and np.allclose(found[:, 2:] - found[:, :2], boxes[:, 2:] - boxes[:, :2])
    assert np.allclose((found[1, :2] + found[1, 2:]) / 2, [29.5 / 32, 30.5 / 32])  # only the first corner is held back


# ---------------------------------------------------------------- findings moved out


@pytest.fixture(scope="module")
def pairs():
    "Visits with a finding and without it, the same exposure."
    out = []
    for visit in plan(DRAWN.but(n_images=8)):
        finding = ("Mass", "Nodule")[len(out) % 2]
        others = tuple(f for f in visit.findings if f != finding)
        draw = lambda names: draw_image(DRAWN, visit.patient, visit.follow_up, findings=names)  # noqa: B023, E731
        out.append((draw((*others, finding)), draw(others), finding))
    return out


@pytest.mark.parametrize("margin", [0.03, 0.06])
def test_a_finding_that_moved_stays_clear_of_lungs_and_heart(pairs, margin):
    moved, differ = 0, 0
    for ill, well, finding in pairs:
        tried = [move_out(ill, well, finding, np.random.default_rng(seed), margin) for seed in range(4)]
        for i, result in enumerate(tried):
            if result is None:
                assert all(t is None for t in tried)
                continue
            image, box = result
            again = move_out(ill, well, finding, np.random.default_rng(i), margin)
            assert np.array_equal(again[0], image) and np.array_equal(again[1], box)
            assert (box >= 0).all() and (box <= 1).all() and image.dtype == np.uint8
            mask, side = ill.masks[finding], len(image)
            dx, dy = np.rint((box - enclosing_box(mask)) * side).astype(int)[:2]
            there = np.zeros_like(mask)
            y, x = np.nonzero(mask)
            there[y + dy, x + dx] = True  # an index over the border would raise, one below zero would come round:
            assert (y + dy).min() >= 0 and (x + dx).min() >= 0 and np.allclose(enclosing_box(there), box)
            inside = np.any([ill.structures[o] for o in ORGANS], 0)
            assert ndimage.distance_transform_edt(~inside)[there].min() > round(margin * side)
            assert well.image[there].min() >= 64  # on the body
            expected = well.image.astype(float)
            expected[y + dy, x + dx] += ill.image[y, x].astype(float) - well.image[y, x]
            assert np.array_equal(image[~there], well.image[~there])
            assert np.array_equal(image, np.clip(expected, 0, 255).astype(np.uint8)) and (image != well.image).any()
            moved += 1
        differ += tried[0] is not None and len({t[1].tobytes() for t in tried}) > 1
    assert moved >= 8 and differ >= 2


def test_without_room_there_is_no_place(pairs):
    ill, well, finding = next(p for p in pairs if move_out(*p, np.random.default_rng(0)))
    everywhere = dict.fromkeys(ORGANS, np.ones_like(ill.masks[finding]))
    for narrow in (ill._replace(structures=everywhere), ill):
        dark = well if narrow is not ill else well._replace(image=np.full_like(well.image, 63))
        assert move_out(narrow, dark, finding, np.random.default_rng(0)) is None
    assert move_out(ill, well, finding, np.random.default_rng(0), margin=0.6) is None


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighting")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CXR_BOOK_HOME", str(folder))
        m.setattr(weighting, "n_cpus", lambda: 1, raising=False)  # draw in this process
        yield folder


@pytest.fixture(scope="module")
def moved(home):
    return DRAWN.but(n_images=24), draw_moved(DRAWN.but(n_images=24))


def test_kinds_are_what_was_drawn(moved):
    settings, folder = moved
    table = pd.read_csv(folder / "images.csv", keep_default_na=False)
    lines = {line["image"]: line for line in table.to_dict("records")}
    assert sorted(p.name for p in (folder / "images").iterdir()) == sorted(lines)
    for i, visit in enumerate(plan(settings)):
        if visit.name not in lines:
            assert KINDS[i % 4] == "outside"  # there was no room
            continue
        line, image = lines[visit.name], cv2.imread(str(folder / "images" / visit.name), cv2.IMREAD_UNCHANGED)
        assert line["kind"] == KINDS[i % 4] and (line["patient"], line["view"]) == (visit.patient, visit.view)
        assert line["labels"] == (NO_FINDING if line["kind"] == "none" else "Mass") and image.shape == (64, 64)
        box = [line[k] for k in ("x0", "y0", "x1", "y1")]
        if i >= 12:  # drawing again takes time
            continue
        others = tuple(f for f in visit.findings if f != "Mass")
        well = draw_image(settings, visit.patient, visit.follow_up, findings=others)
        if line["kind"] == "none":
            assert np.array_equal(image, well.image) and box == [""] * 4
            continue
        x0, y0, x1, y1 = np.array(box, float)
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        y, x = np.nonzero(image != well.image)
        assert x0 * 64 - 1e-6 <= x.min() <= x.max() < x1 * 64 + 1e-6 and y0 * 64 - 1e-6 <= y.min() <= y.max() < y1 * 64 + 1e-6
        inside = np.any([well.structures[o] for o in ORGANS], 0)
        if line["kind"] == "outside":
            assert not inside[y, x].any()
        else:
            ill = draw_image(settings, visit.patient, visit.follow_up, findings=(*others, "Mass"))
            assert np.array_equal(image, ill.image) and np.allclose([x0, y0, x1, y1], ill.boxes["Mass"])
    assert {"inside", "outside", "none"} == set(table.kind)


def test_it_is_drawn_once_and_read_by_patient(moved, monkeypatch):
    settings, folder = moved

    def never(*_, **__):
        raise AssertionError("drawn again")

    monkeypatch.setattr(weighting, "draw_image", never)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert draw_moved(settings) == folder and {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    for other in (dict(settings=settings.but(seed=5)), dict(settings=settings, finding="Nodule")):
        with pytest.raises(AssertionError, match="drawn again"):
            draw_moved(**other)
    data, table = read(folder), pd.read_csv(folder / "images.csv")
    assert data.table["image"].tolist() == table["image"].tolist() and data.present.all() and not data.lists
    assert np.array_equal(data.labels[:, FINDINGS.index("Mass")], table["kind"] != "none") and data.labels.sum(1).max() == 1
    split = official_split(data, valid=0.3)
    assert leaks(data, split.train, np.r_[split.valid, split.test]).images == 0 == leaks(data, split.valid, split.test).images
    assert len(split.train) and len(split.valid) and len(split.test)


def test_a_drawing_that_was_stopped_is_not_taken_for_whole(home, monkeypatch):
    settings, draw, drawn = DRAWN.but(n_images=4, seed=3), draw_image, []

    def dying(*args, **how):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(1)
        return draw(*args, **how)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(weighting, "draw_image", dying)
        draw_moved(settings)
    folder = draw_moved(settings)
    table = pd.read_csv(folder / "images.csv")
    assert sorted(os.listdir(folder / "images")) == sorted(table["image"]) and len(table) >= 3
    assert sorted(os.listdir(folder)) == ["images", "images.csv"]


# ---------------------------------------------------------------- trials


@pytest.fixture(scope="module")
def study(home):
    root = draw_dataset(DRAWN.but(n_images=30, seed=2), home / "set", workers=1)
    segmentation = SETTINGS.segmentation.but(valid=0.3)
    settings = SETTINGS.but(data_root=str(root), mask_root=str(root), segmentation=segmentation.model_dump())
    return open_study(settings, "test", home / "run")


@pytest.fixture(scope="module")
def segmenter(study):
    return weighting.train_segmenter(study)[0]


def test_the_segmenter_is_the_papers_and_lies_in_the_run(study, segmenter):
    assert segmenter.settings == study.settings.segmentation and segmenter.settings.bce == 0
    assert (study.run.folder / "segmenter" / "weights.safetensors").exists()
    again, history = weighting.train_segmenter(study)
    assert len(history) == 2 and all(torch.equal(a, b) for a, b in zip(again.parameters(), segmenter.parameters()))


def test_methods_train_on_the_masks_of_the_cache(study, segmenter, monkeypatch):
    masked = weighting.with_organs(study, segmenter)
    before = {k: v.clone() for k, v in segmenter.state_dict().items()}

    def never(self, x):
        raise AssertionError("segmented in training")

    with monkeypatch.context() as m:
        m.setattr(WeightedNet, "organs", never)
        trained = weighting.train_weighting(masked, segmenter, ("weighted", "senet", "dcnn-attention"))
    assert [*trained] == ["weighted", "senet", "dcnn-attention"]
    for name, (net, history) in trained.items():
        assert len(history) == 1 and (study.run.folder / name / "weights.safetensors").exists()
        out = predict(net, masked.loader("test"), np.zeros(0, int))
        assert out.logits.shape == (len(study.split.test), 14)
    assert all(torch.equal(v, before[k]) for k, v in segmenter.state_dict().items())


def test_only_the_second_body_is_pretrained_for_dcnn(study, segmenter, monkeypatch):
    asked = []
    monkeypatch.setattr(weighting, "pretrained", lambda study, body: asked.append(body) or study.settings)
    monkeypatch.setattr(weighting, "fit", lambda study, name, build, stages=None: (name, stages))
    trained = weighting.train_weighting(study, segmenter, ("attention", "senet"))
    assert asked == [SETTINGS.body] and trained["attention"][1] is None and trained["senet"][1] == [stage_of(study.settings)]
    weighting.train_weighting(study, segmenter, ("weighted", "dcnn"))
    assert asked == [SETTINGS.body] * 2 + [SETTINGS.second_body]


def test_ablations_change_one_thing_each(study, segmenter, monkeypatch):
    calls = {}

    def fit(study, name, build, stages=None):
        calls[name] = build()
        return calls[name], []

    monkeypatch.setattr(weighting, "fit", fit)
    found = weighting.train_ablations(study, segmenter)
    assert [net for net in found.values()] == [*calls.values()] and len(calls) == len(found) == 4
    assert all(name.startswith("ablation-") and " " not in name for name in calls)
    own = study.settings.model_dump()
    changed = [{k: v for k, v in net.settings.model_dump().items() if v != own[k]} for net in calls.values()]
    assert sorted(map(str, changed)) == sorted(map(str, [
        dict(attention=False), dict(mask="threshold"), dict(over="mask"), dict(squash=True)]))  # fmt: skip


def test_a_trial_trains_each_arm_once(study, segmenter, moved, monkeypatch):
    here, nets = weighting.run_trial(study, segmenter, moved[1], "moved")
    folder = study.run.folder / "trial-moved"
    assert here.run.folder == folder and here.settings == study.settings.but(data_root=str(moved[1]))
    assert here.radiographs.root == moved[1] and here.cache.structures == ORGANS and study.cache.masks is None
    assert [*nets] == [*weighting.ARMS] == ["nothing", "features", "pixels"] == [net.settings.weigh for net in nets.values()]
    files = [folder / arm / "weights.safetensors" for arm in weighting.ARMS] + [folder / "organs.npy"]
    times = [f.stat().st_mtime_ns for f in files]

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(Learner, "_fit_stage", never)
    again, same = weighting.run_trial(study, segmenter, moved[1], "moved")
    assert [f.stat().st_mtime_ns for f in files] == times and np.array_equal(again.split.test, here.split.test)
    for arm in weighting.ARMS:
        assert all(torch.equal(v, same[arm].state_dict()[k]) for k, v in nets[arm].state_dict().items())
        logits = predict(same[arm], again.loader("test"), np.zeros(0, int)).logits
        assert logits.shape == (len(here.split.test), 14) and np.isfinite(logits).all()


def test_the_oracle_of_a_study_looks_at_each_true_box(study):
    rows = study.split.test
    boxed = np.intersect1d(rows, study.radiographs.boxed)
    pairs = pairs_of(study.radiographs, boxed)
    maps, at = np.zeros((len(boxed), 14, 64, 64), np.float32), (np.arange(64) + 0.5) / 64
    eye = np.tile(np.eye(3, dtype=np.float32), (len(boxed), 1, 1))
    for i, k, (x0, y0, x1, y1) in zip(pairs.at, pairs.finding, pairs.boxes):
        maps[i, k] = np.exp(-((at - (x0 + x1) / 2) ** 2)[None] / 0.005) * np.exp(-((at - (y0 + y1) / 2) ** 2)[:, None] / 0.005)
    test = Predictions(rows, np.zeros((len(rows), 14)), maps, boxed, eye)
    found = oracle_iou(test, study, PAPER_RULES["004"] if "004" in PAPER_RULES else next(iter(PAPER_RULES.values())))
    middle = np.array([iou(np.array([[(1 - x1 + x0) / 2, (1 - y1 + y0) / 2, (1 + x1 - x0) / 2, (1 + y1 - y0) / 2]]), b[None])[0]
                       for b in pairs.boxes for x0, y0, x1, y1 in [b]])  # fmt: skip
    assert found.shape == (len(pairs.at),) and len(found) > 5 and (found > 0.7).all() and found.mean() > middle.mean() + 0.2


# ---------------------------------------------------------------- arms side by side


def test_arms_are_compared_on_the_same_resamples():
    rng = np.random.default_rng(0)
    n = 50
    patients, y = rng.integers(0, 20, n), (rng.random((n, 3)) < [0.5, 0.3, 0.06]).astype(np.uint8)  # a rare finding
    arms = {"noise": rng.normal(size=(n, 3)), "good": 2 * y + rng.normal(size=(n, 3)), "best": y.astype(float)}
    arms["noise again"] = arms["noise"].copy()
    arms["other scale"] = 5 * arms["good"] - 3
    table = compare_arms(y, arms, patients, 30, seed=3)
    names, counts = np.unique(patients), patient_weights(patients, 30, 3)[1]

    def mean_area(scores, rows):
        parts = []
        for k in range(3):
            ill, well = (scores[rows[y[rows, k] == side], k] for side in (1, 0))
            if len(ill) and len(well):
                parts.append(((ill[:, None] > well).sum() + (ill[:, None] == well).sum() / 2) / (len(ill) * len(well)))
        return sum(parts) / len(parts)

    draws = [np.concatenate([np.repeat(np.flatnonzero(patients == p), c) for p, c in zip(names, count)]) for count in counts]
    areas = {arm: [mean_area(z, rows) for rows in (np.arange(n), *draws)] for arm, z in arms.items()}
    assert any((y[rows].sum(0) == 0).any() for rows in draws)
    for arm, values in areas.items():
        values, added = np.array(values), np.array(values) - areas["noise"]
        expected = [values[0], *np.percentile(values[1:], (2.5, 97.5)), added[0], *np.percentile(added[1:], (2.5, 97.5))]
        assert np.allclose(table.loc[arm], expected, atol=1e-9)
    none = ["difference", "d low", "d high"]
    assert (table.loc[["noise", "noise again"], none] == 0).all(axis=None)
    assert np.allclose(table.loc["other scale"], table.loc["good"]) and [*table.index] == [*arms]
    assert table.AUROC["best"] == 1 > table.AUROC["good"] > table.AUROC["noise"] and table["d low"]["best"] > 0


def test_without_resamples_there_are_no_intervals():
    y, z = np.array([[0], [1], [1]]), np.array([[0.1], [0.2], [0.0]])
    table = compare_arms(y, {"a": z, "b": -z}, np.arange(3), n_boot=0)
    assert table.AUROC.tolist() == [0.5, 0.5] and table[["low", "high", "d low", "d high"]].isna().all(axis=None)
