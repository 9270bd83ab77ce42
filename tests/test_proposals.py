"Chapter 12: what it computes against plain float64 versions, what learns in which stage, and what is never looked at."

import dataclasses

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steps import step

from cxr_book import proposals
from cxr_book.core import CxrError
from cxr_book.evaluation import thresholds_for
from cxr_book.layers import load_strict, read_weights, save_weights
from cxr_book.learner import make_optimizer, set_trainable, train_mode
from cxr_book.loader import PAPER_002, Batch
from cxr_book.localization import PAPER_RULES, detect
from cxr_book.proposals import ProposalNet, ProposalSettings
from cxr_book.study import open_study, predict_parts, pretrained

SETTINGS = ProposalSettings.from_preset("smoke", pretrain_epochs=0, anchors={}, bins=5)  # the paper's regions
FIRST, SECOND = {"body", "pyramid", "saliency"}, {"regions", "crops"}


def batch_of(n=4, side=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, side, side, generator=g), (torch.rand(n, 14, generator=g) < 0.3).float()
    return Batch(x, y, torch.arange(n), torch.eye(3).expand(n, 3, 3))


def net_of(**changes):
    torch.manual_seed(0)
    return ProposalNet(SETTINGS.but(**changes), batch_of(50).y.numpy())


def test_the_defaults_are_the_papers():
    s = ProposalSettings()
    assert (s.image_size, s.batch_size, s.lr, s.weight_decay) == (512, 8, (1e-3, 1e-3, 3e-4), 1e-3)
    assert (s.slope, s.pyramid, s.hidden, s.bins, s.region_width, s.crop_size) == (0.1, 256, 128, 5, 64, 64)
    assert (s.body, s.crop_body, s.weights, s.tau, s.choice) == ("densenet121", "resnet34", "imagenet", (1.0, 0.001), "straight-through")
    assert (s.pool, s.gamma, s.judged_by, s.schedule, s.betas[0], s.clip) == ("lse", 1.0, "crop", "constant", 0.9, None)
    assert len(s.anchors.boxes()) == 395 and s.normals is None
    assert s.augment.model_dump(exclude_defaults=True) == {k: v for k, v in PAPER_002.items()}


@pytest.mark.parametrize("slope", [0.1, 0.0])
def test_every_relu_is_leaky(slope):
    net = net_of(slope=slope)
    kinds = {type(m).__name__ for m in net.modules()}
    assert "ReLU" not in kinds and all(m.negative_slope == slope for m in net.modules() if isinstance(m, torch.nn.LeakyReLU))
    assert net.saliency.slope == net.regions.slope == slope


def test_saliency_is_what_one_head_a_class_gives():
    torch.manual_seed(0)
    head, x = proposals.SaliencyHead(6, 3, 5).double(), torch.randn(4, 6, 7, 7, dtype=torch.double)
    features, saliency = head(x)
    inner = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.1)
    for k in range(5):
        own = torch.einsum("co,bohw->bchw", head.conv.weight[3 * k : 3 * k + 3, :, 0, 0], inner)
        assert torch.allclose(features[:, k], own, atol=1e-12)
        plain = F.leaky_relu(F.batch_norm(own, None, None, training=True), 0.1)
        plain = torch.einsum("c,bchw->bhw", head.convs.weight[k, :, 0, 0], plain) + head.convs.bias[k]
        assert torch.allclose(saliency[:, k].double(), plain, atol=1e-5)


def test_each_crop_is_judged_for_its_own_class():
    torch.manual_seed(0)
    judge = proposals.CropClassifier("small-resnet", n_classes=5).eval()
    crops = torch.rand(2, 5, 1, 16, 16)
    logits = judge(crops)
    crops[:, 3] = 1 - crops[:, 3]
    assert (logits != judge(crops)).any(0).tolist() == [False, False, False, True, False]
    pooled = judge.body(crops[:, 3])[-1].mean((2, 3))
    assert torch.allclose(judge(crops)[:, 3], judge.heads(pooled)[:, 3], atol=1e-5)


def test_refinement_starts_at_the_squares():
    net = net_of().eval()
    out = net(batch_of().x)
    boxes = out.extras["boxes"]
    assert torch.equal(boxes, net.regions.boxes.expand_as(boxes)) and boxes.shape == (4, 14, 395, 4)
    best = out.extras["scores"].argmax(2)
    assert torch.equal(out.extras["chosen"], net.regions.boxes[best])


def test_maps_are_those_of_plain_loops():
    net = net_of().eval()
    torch.nn.init.normal_(net.regions.delta.weight, std=0.5)
    with torch.no_grad():
        out = net(batch_of(2).x)
    e, n = out.extras, out.maps.shape[-1]
    assert torch.equal(out.maps, e["saliency"] * e["regions"]) and not torch.equal(e["boxes"][0, 0], net.regions.boxes)
    for b, k in ((0, 0), (1, 7)):
        scores = e["scores"][b, k].double()
        weights = (scores - scores.max()).exp()
        plain = torch.zeros(n, n, dtype=torch.double)
        for (x0, y0, x1, y1), w in zip((e["boxes"][b, k].double() * n).tolist(), (weights / weights.sum()).tolist()):
            for v in range(n):
                for u in range(n):
                    plain[v, u] += w * max(0.0, min(x1, u + 1) - max(x0, u)) * max(0.0, min(y1, v + 1) - max(y0, v))
        assert torch.allclose(plain.float(), e["regions"][b, k], atol=1e-5)
        logit = net.classify(batch_of(2).x)[2][b, k].double()
        assert torch.allclose(out.logits[b, k].double(), (logit.flatten().logsumexp(0) - np.log(n * n)), atol=1e-5)


def test_the_largest_component_is_opencvs():
    heat = np.random.default_rng(0).random((40, 24, 24)).astype(np.float32)
    heat = np.stack([cv2.GaussianBlur(h, (0, 0), 1.5) for h in heat])
    heat = (heat - heat.min((1, 2), keepdims=True)) / np.ptp(heat, (1, 2), keepdims=True)
    rule = PAPER_RULES["002"]
    found = detect(heat, rule.rule, rule.threshold)
    for i, h in enumerate(heat):
        n, labels, stats, _ = cv2.connectedComponentsWithStats((h >= 0.5).astype(np.uint8), connectivity=8)
        sizes = [(labels == k).sum() for k in range(1, n)]
        mask = labels == 1 + int(np.argmax(sizes))
        y, x = np.nonzero(mask)
        assert np.array_equal(found.regions[i], mask)
        assert np.allclose(found.boxes[i] * 24, (x.min(), y.min(), x.max() + 1, y.max() + 1))


@pytest.mark.parametrize("stage, learns", [(0, FIRST), (1, SECOND), (2, FIRST | SECOND)])
def test_what_learns_in_which_stage(stage, learns):
    net, batch = net_of(), batch_of()
    stage = net.stages()[stage]
    losses, changed = step(net, batch, stage)
    assert changed == learns  # neither weights nor moving statistics of the rest
    parts = [losses[k] for k in ("cls", "rpn") if k in losses]
    expected = {"classify": parts[0], "detect": parts[-1], "joint": sum(parts)}[stage.name]
    assert torch.isfinite(losses["loss"]) and torch.allclose(losses["loss"].detach(), expected)


def test_learnt_sharpness_learns_in_the_first_stage():
    net, batch = net_of(pool="lse-lba"), batch_of()
    stage = net.stages()[0]
    set_trainable(net, stage.trainable)
    net.loss(batch, stage.name)["loss"].backward()
    assert net.pool.beta.grad.abs().sum() > 0


def test_losses_are_the_printed_ones():
    net, batch = net_of(), batch_of(6)
    share = batch_of(50).y.double().mean(0)
    net.eval()
    with torch.no_grad():
        out, losses = net(batch.x), net.loss(batch, "joint")
    for logits, name in ((out.logits, "cls"), (out.extras["judged"], "rpn")):
        total = 0.0
        for z, y in zip(logits.double(), batch.y.double()):
            for k in range(14):
                p = 1 / (1 + torch.exp(-z[k]))
                total -= (1 - share[k]) * y[k] * torch.log(p) + share[k] * (1 - y[k]) * torch.log(1 - p)
        assert abs(losses[name].item() - total.item() / 6) < 1e-5


def test_gradients_reach_scores_and_edges_through_the_crop():
    torch.manual_seed(0)
    net = net_of(choice="soft").double().eval()
    x = F.interpolate(torch.rand(1, 1, 8, 8, dtype=torch.double), size=64, mode="bicubic")
    scores = torch.randn(1, 14, 395, dtype=torch.double, requires_grad=True)
    deltas = (0.1 * torch.randn(1, 14, 395, 4, dtype=torch.double)).requires_grad_()

    def judged():
        boxes = proposals.decode(deltas, net.regions.boxes.double()).clamp(0, 1)
        return net.judge(x, scores, boxes, torch.zeros(1, 14))[1].sum()

    found = torch.autograd.grad(judged(), (scores, deltas))
    assert all(g.abs().sum() > 0 for g in found)
    for tensor, gradient in zip((scores, deltas), found):
        along = gradient / gradient.norm()
        ends = []
        for step in (1e-7, -1e-7):
            with torch.no_grad():
                tensor += step * along
                ends.append(judged().item())
                tensor -= step * along
        assert abs((ends[0] - ends[1]) / 2e-7 - gradient.norm().item()) < 1e-4 * gradient.norm().item()


def test_the_temperature_falls_over_the_last_two_stages():
    net = net_of(epochs=(3, 6, 2), tau=(1.0, 0.001))
    seen = []
    for stage, n in (("classify", 3), ("detect", 6), ("joint", 2)):
        for step in range(10 * n):
            net.anneal(stage, step / (10 * n))
            seen.append(net.tau)
    assert seen[:31] == [1.0] * 31
    ratios = np.diff(np.log(seen[30:]))
    assert np.allclose(ratios, np.log(0.001) / 80) and seen[-1] > 0.001


@pytest.mark.parametrize("tau", [1.0, 0.001])
def test_training_stays_finite_at_any_temperature(tau):
    net, batch = net_of(), batch_of()
    train_mode(net)
    net.tau = tau
    for _ in range(3):
        loss = net.loss(batch, "joint")["loss"]
        loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_views_are_answers_of_one_network():
    net = net_of().eval()
    x = batch_of().x
    with torch.no_grad():
        out, sal, det, mix = net(x), *(net.view(name)(x) for name in ("sal", "det", "mix"))
    assert torch.equal(sal.logits, out.logits) and torch.equal(sal.maps, out.extras["saliency"])
    assert torch.equal(det.logits, out.extras["judged"]) and torch.equal(det.maps, out.extras["regions"])
    assert torch.equal(mix.logits, out.logits) and torch.equal(mix.maps, out.maps) and net.answer == "mix"
    with pytest.raises(CxrError, match="det"):
        net.view("dex")
    alone = proposals.methods(SETTINGS)["det"]().eval()
    alone.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(alone(x).maps, det.maps)


def test_without_labels_it_predicts_and_says_why_it_cannot_learn():
    net = ProposalNet(SETTINGS).eval()
    assert net(batch_of().x).logits.shape == (4, 14)
    with pytest.raises(CxrError, match="labels"):
        net.loss(batch_of(), "classify")


@pytest.mark.parametrize("change", [dict(pool="max"), dict(choice="best"), dict(slope=1.5), dict(tau=(1.0, 0.0)), dict(judged_by="image"),
                                    dict(anchors=dict(sides=(64,), steps=(60,))), dict(epochs=(1, 2)), dict(crop_sise=3)])  # fmt: skip
def test_impossible_settings_are_refused(change):
    with pytest.raises(CxrError, match=next(iter(change))):
        SETTINGS.but(**change)


def test_detection_goes_on_from_the_classifier_and_validated_thresholds_see_no_test_box(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path))
    settings = ProposalSettings.from_preset("smoke", valid=0.3)
    study = open_study(settings, "test", tmp_path / "run")
    trained = proposals.train_proposals(study)
    stages = [line["stage"] for line in trained["mix"][1]]
    assert stages == ["classify", "detect", "joint"] and pretrained(study, settings.body).weights.endswith("body.safetensors")
    again = ProposalNet(settings)
    load_strict(again, tmp_path / "run" / "mix" / "weights.safetensors")
    test, valid = predict_parts(study, again)
    rule, data = PAPER_RULES["002"], study.radiographs
    poisoned = dataclasses.replace(data, boxes=data.boxes.copy())
    poisoned.boxes.loc[data.boxes["row"].isin(study.split.test), ["x0", "y0", "x1", "y1"]] = [0.0, 0.0, 0.02, 0.9]
    for mode, same in (("validated", True), ("oracle", False)):
        clean, bad = (thresholds_for(mode, test, d, rule, valid)[0] for d in (data, poisoned))
        assert (clean == bad) is same


def test_a_file_of_weights_serves_the_crops_only_where_it_fits(tmp_path):
    file = str(save_weights(net_of().body, tmp_path / "body.safetensors"))
    both, other = (ProposalNet(SETTINGS.but(weights=file, crop_body=body)) for body in (SETTINGS.body, "resnet18"))
    weights, _ = read_weights(file)
    for body in (both.body, both.crops.body, other.body):
        assert all(torch.equal(v, weights[k]) for k, v in body.state_dict().items())


@pytest.mark.slow
def test_all_stages_at_the_papers_size():
    settings = ProposalSettings(weights=None)
    batch = batch_of(1, 512)
    torch.manual_seed(0)
    net = ProposalNet(settings, batch_of(50).y.numpy())
    stage = net.stages()[2]
    opt = make_optimizer(stage, set_trainable(net, stage.trainable))
    train_mode(net)
    losses = net.loss(batch, stage.name)
    losses["loss"].backward()
    opt.step()
    assert torch.isfinite(losses["loss"]) and all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        out = net.eval()(batch.x)
    assert out.maps.shape == (1, 14, 128, 128) and out.extras["boxes"].shape == (1, 14, 395, 4)
