"What the notebook of `guided` cannot say: every body, other maps and types, crops against slices, steps, refusals."

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from steps import step

from cxr_book.bodies import BODIES, Body, count_parameters
from cxr_book.core import CxrError
from cxr_book.guided import ExcitedClassifier, GuidedNet, attention_box, attention_heat, excite
from cxr_book.layers import load_strict, save_weights
from cxr_book.learner import Stage, make_optimizer, set_trainable, train_mode
from cxr_book.loader import Batch
from cxr_book.regions import crop
from cxr_book.study import PlainClassifier

torch.set_num_threads(1)
PARTS = {"global": "whole", "local": "local", "fusion": "fusion"}
SMALL = [name for name in BODIES if name.startswith("small")]


def batch_of(n=4, side=64, seed=0, classes=14):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, side, side, generator=g), (torch.rand(n, classes, generator=g) < 0.3).float()
    return Batch(x, y, torch.arange(n), torch.eye(3).expand(n, 3, 3))


def net_of(body="small-resnet", **changes):
    torch.manual_seed(0)
    return GuidedNet(body, **changes)


# ---------------------------------------------------------------- squeeze and excitation


def plain_gate(x, gate):
    "Squeeze and excitation in loops: maps (B, C, h, w) and the gates (B, C), float64."
    w1, b1, w2, b2 = (p.detach().double().flatten(min(1, p.ndim - 1)) for p in gate.parameters())
    gates = torch.zeros(x.shape[:2], dtype=torch.double)
    for i, maps in enumerate(x.double()):
        squeezed = [m.sum().item() / m.numel() for m in maps]
        inner = [max(0.0, sum(w * m for w, m in zip(row.tolist(), squeezed)) + b) for row, b in zip(w1, b1.tolist())]
        for c, (row, b) in enumerate(zip(w2, b2.tolist())):
            gates[i, c] = 1 / (1 + math.exp(-sum(w * v for w, v in zip(row.tolist(), inner)) - b))
    return x.double() * gates[:, :, None, None], gates


@pytest.mark.parametrize("name", SMALL)
def test_small_bodies_with_gates(name):
    torch.manual_seed(0)
    plain = Body(name).double().eval()
    body = excite(copy.deepcopy(plain), reduction=8)
    same = ("name", "blocks", "channels", "strides")
    assert all(getattr(body, key) == getattr(plain, key) for key in same)
    assert all(p.dtype == torch.double for p in body.parameters())
    x = batch_of(2).x.double()
    maps, before = body(x), plain.stem(plain.grey(x))
    assert [m.shape for m in maps] == [m.shape for m in plain(x)]
    for block, m, channels in zip(body.blocks, maps, body.channels):
        own = getattr(plain, block)(before)  # the plain block on what the gates have left so far
        gated, gates = plain_gate(own, getattr(body, block).gate)
        assert gates.shape == (2, channels) and 0 < gates.min() and gates.max() < 1
        assert torch.allclose(m, gated, rtol=1e-9, atol=1e-12)
        before = m


OTHERS = [("small-densenet", 3), ("small-resnet", 1000)]


@pytest.mark.parametrize("name, reduction", [(name, 16) for name in BODIES] + OTHERS)
def test_the_gates_of_every_body_are_counted(name, reduction):
    body = Body(name)
    before, own = count_parameters(body), {k: v.clone() for k, v in body.state_dict().items()}
    assert excite(body, reduction) is body
    inner = [max(1, c // reduction) for c in BODIES[name].channels]
    assert count_parameters(body) - before == sum(2 * c * s + s + c for c, s in zip(BODIES[name].channels, inner))
    after = {k.replace(".block.", ".", 1): v for k, v in body.state_dict().items() if ".gate." not in k}
    assert after.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in after.items())


def test_what_the_paper_adds_to_a_densenet():
    assert count_parameters(excite(Body("densenet121"))) == 6_953_856 + 306_096


@pytest.mark.parametrize("name", SMALL)
def test_open_gates_change_nothing_and_closed_ones_leave_nothing(name):
    plain, x = Body(name).eval(), batch_of(2).x
    body = excite(copy.deepcopy(plain))
    for bias, factor in ((50.0, 1), (-200.0, 0)):
        with torch.no_grad():
            for block in body.blocks:
                gate = getattr(body, block).gate
                gate.fc2.weight.zero_()
                gate.fc2.bias.fill_(bias)
            assert torch.equal(body(x)[0], factor * plain(x)[0])
            assert factor == 0 or all(torch.equal(a, b) for a, b in zip(body(x), plain(x)))


def test_a_strided_body_keeps_its_stride():
    body = excite(Body("small-resnet", stride=8))
    assert body.strides == (4, 8, 8) and body(batch_of(1).x)[-1].shape == (1, 128, 8, 8)
    assert body(batch_of(1).x)[-1].is_contiguous(memory_format=torch.channels_last)


def test_gates_are_not_put_twice_nor_without_an_inner_layer():
    body = Body("efficientnet_b4")  # has gates of another kind inside its blocks
    with pytest.raises(CxrError, match="reduction = 0"):
        excite(body, 0)
    excite(body)
    with pytest.raises(CxrError, match="once"):
        excite(body)


def test_the_excited_classifier_takes_the_weights_of_a_plain_body(tmp_path):
    torch.manual_seed(0)
    plain = PlainClassifier("small-densenet")
    file = str(save_weights(plain.body, tmp_path / "body.safetensors"))
    net = ExcitedClassifier("small-densenet", file)
    assert all(torch.equal(a, b) for a, b in zip(plain.body.block2.parameters(), net.body.block2.block.parameters()))
    batch = batch_of()
    losses, changed = step(net, batch, Stage())
    assert changed == {"body", "classifier"} and losses["logits"].shape == (4, 14)
    again = ExcitedClassifier("small-densenet")
    load_strict(again, save_weights(net, tmp_path / "net.safetensors"))
    assert torch.equal(again.eval()(batch.x).logits, net.eval()(batch.x).logits)
    with pytest.raises(CxrError, match="does not fit"):  # a body with gates is no plain body
        Body("small-densenet", save_weights(net.body, tmp_path / "gates.safetensors"))


# ---------------------------------------------------------------- attention


def test_heat_is_that_of_plain_loops():
    x = torch.randn(3, 5, 4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    heat = attention_heat(x)
    assert heat.shape == (3, 4, 6) and not heat.requires_grad
    for i in range(3):
        strongest = [[max(abs(x[i, c, v, u].item()) for c in range(5)) for u in range(6)] for v in range(4)]
        low, high = min(map(min, strongest)), max(map(max, strongest))
        plain = [[(a - low) / (high - low) for a in row] for row in strongest]
        assert torch.allclose(heat[i].double(), torch.tensor(plain).double(), atol=1e-6)
    assert attention_heat(torch.full((2, 3, 4, 4), -2.0)).eq(0).all()
    assert attention_heat(x.detach().bfloat16()).dtype == torch.float32


def box_plain(heat, threshold, least):
    "The box of one map, piece by piece, with fractions of its own."
    h, w = heat.shape
    left = {(v, u) for v in range(h) for u in range(w) if heat[v, u] >= threshold and heat[v, u] > 0}
    pieces = []
    while left:
        todo, piece = [left.pop()], set()
        while todo:
            v, u = todo.pop()
            piece.add((v, u))
            near = {(v + dv, u + du) for dv in (-1, 0, 1) for du in (-1, 0, 1)} & left
            left -= near
            todo += near
        pieces.append(piece)
    sizes = [len(p) for p in pieces]
    if not pieces or sizes.count(max(sizes)) > 1:
        return None if pieces else [0, 0, 1, 1]
    rows, columns = zip(*pieces[sizes.index(max(sizes))])
    edges = []
    for cells, n in ((columns, w), (rows, h)):
        low, high = min(cells) / n, (max(cells) + 1) / n
        if high - low < least:
            middle = min(max((low + high) / 2, least / 2), 1 - least / 2)
            low, high = middle - least / 2, middle + least / 2
        edges.append((low, high))
    return [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]


@pytest.mark.parametrize("least", [0.0, 0.125, 0.3, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 1.0])
def test_boxes_are_those_of_plain_loops(threshold, least):
    heat = attention_heat(torch.randn(60, 2, 8, 12, generator=torch.Generator().manual_seed(0)))
    boxes, known = attention_box(heat, threshold, least), 0
    assert ((0 <= boxes) & (boxes <= 1)).all() and (boxes[:, 2:] - boxes[:, :2] >= least - 1e-6).all()
    for h, box in zip(heat, boxes):
        if (plain := box_plain(h, threshold, least)) is not None:  # of equals either may be taken
            assert torch.allclose(box, torch.tensor(plain, dtype=torch.float32), atol=1e-6)
            known += 1
    assert known > 20


CASES = {
    "constant": ([], (0, 0, 8, 8)),
    "corner": ([(7, 7, 1.0)], (6, 6, 8, 8)),
    "other corner": ([(0, 0, 1.0)], (0, 0, 2, 2)),
    "one cell": ([(3, 2, 1.0)], (1.5, 2.5, 3.5, 4.5)),
    "one row": ([(0, u, 1.0) for u in range(8)], (0, 0, 8, 2)),
    "the larger wins": ([(1, 1, 1.0), (5, 4, 0.8), (5, 5, 0.8), (6, 4, 0.8)], (4, 5, 6, 7)),
    "a corner joins": ([(1, 1, 1.0), (2, 2, 0.8), (3, 3, 0.8), (6, 6, 1.0)], (1, 1, 4, 4)),
    "just hot": ([(3, 2, 0.75), (3, 3, 0.75), (3, 4, 0.7), (7, 7, 1.0)], (2, 2.5, 5, 4.5)),
    "not hot": ([(3, 2, 0.69), (3, 3, 0.69), (3, 4, 0.69), (7, 7, 1.0)], (6, 6, 8, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_boxes_by_hand(case):
    cells, asked = CASES[case]
    heat = torch.zeros(1, 8, 8)
    for v, u, value in cells:
        heat[0, v, u] = value
    assert (8 * attention_box(heat, least=0.25))[0].tolist() == list(asked)


def test_a_box_that_is_large_enough_is_not_touched():
    heat = torch.zeros(1, 7, 7)
    heat[0, 2:5, 1:3] = 1
    exact = torch.tensor([[1 / 7, 2 / 7, 3 / 7, 5 / 7]], dtype=torch.double).float()
    assert torch.equal(attention_box(heat), exact) and torch.equal(attention_box(heat, least=0), exact)


@pytest.mark.parametrize("how", [dict(threshold=1.5), dict(threshold=-0.1), dict(least=1.01), dict(least=-1.0)])
def test_impossible_shares_are_refused(how):
    for call in (lambda: attention_box(torch.zeros(1, 4, 4), **how), lambda: net_of(**how)):
        with pytest.raises(CxrError, match=f"{next(iter(how))} = "):
            call()


def test_maps_of_other_shapes_are_refused():
    with pytest.raises(CxrError, match="heat has the shape"):
        attention_box(torch.zeros(1, 1, 4, 4))
    with pytest.raises(CxrError, match="square"):
        net_of()(torch.rand(1, 1, 64, 96))


# ---------------------------------------------------------------- the network


def given(net, features, x):
    "What the network makes of hand-made features of the global branch."
    whole = net.whole(x)
    return net.look(x, whole._replace(extras=dict(features=features)))


def test_a_crop_of_whole_pixels_is_a_slice():
    net, x = net_of(threshold=0.9).eval().view("local"), batch_of(3).x
    features = torch.zeros(3, 128, 4, 4)
    features[0, 3, 1:3, 1:3], features[1, 5, 2:, :2] = -2, 7
    with torch.no_grad():
        out = given(net, features, x)
    crops = out.extras["crop"]
    assert (64 * out.extras["box"]).tolist() == [[16, 16, 48, 48], [0, 32, 32, 64], [0, 0, 64, 64]]
    for i, part in enumerate((x[0, :, 16:48, 16:48], x[1, :, 32:, :32])):
        blown = F.interpolate(part[None], size=64, mode="bilinear", align_corners=False)[0]
        inner = crops[i, :, 1:-1, 1:-1]  # at its edge the crop looks at the pixels beyond
        assert torch.allclose(inner, blown[:, 1:-1, 1:-1], atol=1e-5)
        own = crop(x[i][None], out.extras["box"][i].view(1, 1, 4), 32)[0, 0]
        assert torch.allclose(own, part, atol=1e-5)
    assert torch.allclose(crops[2], x[2], atol=1e-5)


@pytest.mark.parametrize("body", ["small-resnet", "small-densenet", "small-resnetv2"])
def test_forward_agrees_with_its_parts(body):
    net, x = net_of(body, threshold=0.5).double().eval(), batch_of(2).x.double()
    with torch.no_grad():
        out = net(x)
        features = net.whole.body(x)[-1]
        heat = attention_heat(features)
        box = attention_box(heat, 0.5, 0.125)
        pooled, logits = [], {}
        for name, seen in (("whole", x), ("local", out.extras["crop"])):
            branch = getattr(net, name)
            pooled.append(branch.body(seen)[-1].mean((2, 3)))
            linear = branch.classifier.conv
            logits[name] = F.linear(pooled[-1], linear.weight.flatten(1), linear.bias)
        logits["fusion"] = F.linear(torch.cat(pooled, 1), net.fusion.conv.weight.flatten(1), net.fusion.conv.bias)
        views = {answer: net.view(answer)(x) for answer in net.answers}
    e = out.extras
    assert e.keys() == {"heat", "box", "crop", "features", "global_logits", "local_logits", "fusion_logits"}
    assert torch.equal(e["features"], features) and torch.equal(e["heat"], heat) and torch.equal(e["box"], box)
    assert e["heat"].shape == (2, *features.shape[2:]) and e["box"].shape == (2, 4) and e["crop"].shape == x.shape
    cam = torch.einsum("kc,bchw->bkhw", net.whole.classifier.conv.weight.flatten(1), features)
    cam = cam + net.whole.classifier.conv.bias.view(1, -1, 1, 1)
    for answer, part in PARTS.items():
        assert torch.allclose(views[answer].logits, logits[part], atol=1e-9)
        assert torch.equal(e[f"{answer}_logits"], views[answer].logits)
        assert torch.allclose(views[answer].maps, cam, atol=1e-9)


def test_an_answer_asks_no_branch_that_it_does_not_need(monkeypatch):
    net, x = net_of().eval(), batch_of(2).x

    def never(*args):
        raise AssertionError("was asked")

    monkeypatch.setattr(net.fusion, "forward", never)
    assert "fusion_logits" not in net.view("local")(x).extras
    monkeypatch.setattr(net.local, "forward", never)
    out = net.view("global")(x)
    assert "local_logits" not in out.extras and torch.equal(out.logits, out.extras["global_logits"])
    for answer in ("local", "fusion"):
        with pytest.raises(AssertionError, match="was asked"):
            net.view(answer)(x)


def test_the_template_makes_three_stages():
    stage = Stage(epochs=7, lr=2e-4, weight_decay=1e-4, schedule="onecycle", monitor="auroc")
    net = net_of(stage=stage)
    assert net.stages() == [stage.but(name=k, trainable=(v,)) for k, v in PARTS.items()]
    assert net.answer == "fusion" and (net.threshold, net.least) == (0.7, 0.125)


@pytest.mark.parametrize("name", PARTS)
def test_a_step_moves_exactly_its_own_branch(name):
    net, batch = net_of(), batch_of()
    stage = {s.name: s for s in net.stages()}[name]
    before = {k: v.clone() for k, v in net.named_parameters()}
    losses, changed = step(net, batch, stage)
    assert changed == {PARTS[name]}  # neither weights nor moving statistics of the rest
    moved = {k for k, v in net.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith(PARTS[name])}
    assert torch.isfinite(losses["loss"]) and not losses["logits"].requires_grad


@pytest.mark.parametrize("name", PARTS)
def test_the_loss_is_the_printed_one(name):
    net, batch = net_of().eval(), batch_of()
    with torch.no_grad():
        losses, logits = net.loss(batch, name), net.view(name)(batch.x).logits
    assert torch.equal(losses["logits"], logits)
    total = 0.0
    for z, y in zip(logits.flatten().tolist(), batch.y.flatten().tolist()):
        p = 1 / (1 + math.exp(-z))
        total -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert losses["loss"].item() == pytest.approx(total / logits.numel(), rel=1e-5)


@pytest.mark.parametrize("name, reached", [("local", {"local"}), ("fusion", {"local", "fusion"})])
def test_no_gradient_reaches_the_global_branch_from_later_stages(name, reached):
    net = net_of()
    set_trainable(net)
    net.loss(batch_of(), name)["loss"].backward()
    assert {k.split(".")[0] for k, p in net.named_parameters() if p.grad is not None} == reached


def test_the_crop_passes_no_gradient_to_where_it_was_taken():
    net, x = net_of().eval(), batch_of(2).x
    features = torch.randn(2, 128, 4, 4, requires_grad=True)
    out = given(net.view("local"), features, x)
    assert torch.autograd.grad(out.logits.sum(), features, allow_unused=True) == (None,)
    fused = given(net, features, x)  # the fusion does look at the global features themselves
    assert torch.autograd.grad(fused.logits.sum(), features)[0].abs().sum() > 0


def test_a_validation_without_gradients_stays_without():
    net = net_of()
    with torch.no_grad():
        assert not any(net.loss(batch_of(), name)["loss"].requires_grad for name in PARTS)


def test_the_branches_have_weights_of_their_own(tmp_path):
    net = net_of("small-densenet")
    assert not torch.equal(net.whole.classifier.conv.weight, net.local.classifier.conv.weight)
    assert not {id(p) for p in net.whole.parameters()} & {id(p) for p in net.local.parameters()}
    file = str(save_weights(net.local.body, tmp_path / "body.safetensors"))
    both = GuidedNet("small-densenet", file)
    for branch in (both.whole, both.local):
        assert all(torch.equal(a, b) for a, b in zip(branch.body.parameters(), net.local.body.parameters()))


def test_another_number_of_classes():
    net, batch = net_of(n_classes=3), batch_of(classes=3)
    out = net(batch.x)
    assert out.logits.shape == (4, 3) and out.maps.shape[1] == 3 and net.fusion.conv.weight.shape == (3, 256, 1, 1)
    assert torch.isfinite(net.loss(batch, "fusion")["loss"])


def test_bf16_gives_logits_in_float32():
    for net in (net_of(), ExcitedClassifier("small-resnet")):
        net.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = net(batch_of(2).x)
        wide = ("heat", "box", "crop", "local_logits")
        found = [out.logits, out.maps, *(out.extras[k] for k in wide if k in out.extras)]
        assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in found)
        assert out.extras["features"].dtype == torch.bfloat16
    net = net_of()
    stage = net.stages()[1]
    opt = make_optimizer(stage, set_trainable(net, stage.trainable))
    train_mode(net)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.loss(batch_of(), "local")["loss"]
    loss.backward()
    opt.step()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_inference_mode_and_one_image():
    net = net_of().eval()
    with torch.inference_mode():
        one, all_ = net(batch_of().x[2:3]), net(batch_of().x)
    assert torch.allclose(one.logits, all_.logits[2:3], atol=1e-5)  # no image touches another


def test_unknown_answers_and_stages_are_refused():
    net = net_of()
    for call in (lambda: net.view("locale"), lambda: net.loss(batch_of(), "locale")):
        with pytest.raises(CxrError, match="local"):
            call()
    with pytest.raises(CxrError, match="small-resnet"):
        GuidedNet("small-resnt")
