"What the notebook of `regions` cannot say: other sizes and types, frozen parts, differences, refusals, cost at size."

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from costs import assert_cheap

from cxr_book.core import CxrError
from cxr_book.measure import peak_memory
from cxr_book.regions import (
    CHOICES,
    SITUATIONS,
    Anchors,
    InChunks,
    RegionHead,
    align_lattice,
    align_plain,
    aligners,
    average_regions,
    crop,
    decode,
    encode,
    pick,
    region_costs,
    region_scores_plain,
    regions_apart,
)

torch.set_num_threads(1)
FEW = Anchors(sides=(2, 3), steps=(2, 4), frame=4)  # 9 + 4 regions


def random(*shape, seed=0, dtype=torch.float64, learns=False):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_(learns)


def head_of(channels, width=4, dtype=torch.float64, **kwargs):
    "A head whose deltas are not all 0."
    torch.manual_seed(0)
    head = RegionHead(channels, width, **kwargs).to(dtype)
    torch.nn.init.normal_(head.delta.weight, std=0.1)
    torch.nn.init.normal_(head.delta.bias, std=0.1)
    return head


def gradients(outputs, tensors):
    toward = [random(*y.shape, seed=9 + i, dtype=y.dtype) for i, y in enumerate(outputs)]
    return torch.autograd.grad(outputs, tensors, toward)


def read(anchors, maps, size, sampling):
    "As the head reads: (B, N, C, size, size)."
    down, across = ([m.to(maps) for m in aligners(anchors, n, size, sampling)] for n in maps.shape[-2:])
    found = [regions_apart(align_lattice(maps, *pair), size) for pair in zip(down, across)]
    return torch.cat([x.unflatten(0, (len(maps), -1)) for x in found], 1)


# --- anchors


def test_the_lattice_of_the_paper():
    "FACTS, 002: sizes 64, 128, 256, centres 32, 64, 128 apart, both borders included, clipped."
    asked = [
        [max(0, x - s / 2), max(0, y - s / 2), min(512, x + s / 2), min(512, y + s / 2)]
        for s in (64, 128, 256)
        for y in range(0, 513, s // 2)
        for x in range(0, 513, s // 2)
    ]
    assert len(asked) == 395 and (Anchors().boxes() * 512).tolist() == asked


@pytest.mark.parametrize(
    "sides, steps, frame, count",
    [((64,), (32,), 512, 17**2), ((32, 64), (32, 64), 256, 9**2 + 5**2), ((500,), (224,), 224, 4), ((0.5,), (0.25,), 1, 25)],
)
def test_other_lattices(sides, steps, frame, count):
    boxes = Anchors(sides=sides, steps=steps, frame=frame).boxes()
    assert len(boxes) == count and len(boxes.unique(dim=0)) == (1 if frame == 224 else count)
    assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, :2] < boxes[:, 2:]).all()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(steps=(30, 64, 128)), "step 30.*divide 512"),
        (dict(sides=(64, 128)), "2 sides and 3 steps"),
        (dict(sides=(), steps=()), "0 sides and 0 steps"),
        (dict(sides=(0, 1, 2)), "above 0"),
        (dict(steps=(-32, 64, 128)), "above 0"),
        (dict(frame=0), "frame = 0"),
        (dict(side=(64,)), "did you mean 'sides'"),
    ],
)
def test_impossible_anchors_are_refused(wrong, words):
    with pytest.raises(CxrError, match=words):
        Anchors(**wrong)


# --- boxes


def test_decode_by_its_usual_form():
    boxes, deltas = Anchors().boxes().double(), random(395, 4)
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
    centre, size = centre + deltas[:, :2] * size, size * deltas[:, 2:].exp()
    asked = torch.cat([centre - size / 2, centre + size / 2], 1)
    assert torch.allclose(decode(deltas, boxes), asked, rtol=0, atol=1e-13)
    assert torch.allclose(encode(asked, boxes), deltas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_delta_changes_no_bit(dtype):
    boxes = Anchors().boxes().to(dtype)
    assert torch.equal(decode(torch.zeros_like(boxes).expand(2, 3, 395, 4), boxes), boxes.expand(2, 3, 395, 4))


def test_decode_and_encode_by_differences():
    boxes, deltas = FEW.boxes().double().requires_grad_(), random(2, 13, 4, learns=True)
    assert torch.autograd.gradcheck(decode, (deltas, boxes))
    assert torch.autograd.gradcheck(encode, (decode(deltas, boxes).detach().requires_grad_(), boxes))
    huge = torch.full((4,), 50.0, requires_grad=True)
    wide = decode(huge, torch.tensor([0.0, 0, 1, 1]))
    assert torch.allclose(wide[2:] - wide[:2], torch.tensor(1000 / 16), rtol=1e-4)  # the bound


# --- features


@pytest.mark.parametrize("h, w", [(1, 1), (1, 9), (8, 8), (13, 29), (32, 20), (64, 64)])
@pytest.mark.parametrize("size, sampling", [(5, 2), (1, 1), (3, 4), (7, 1)])
@pytest.mark.parametrize("anchors", [Anchors(), FEW, Anchors(sides=(9, 5), steps=(7, 14), frame=28)])
def test_reading_is_roi_align(h, w, size, sampling, anchors):
    boxes = torch.cat([_boxes(edges) for edges in anchors.intervals()])  # not rounded to float32
    maps = random(2, 3, h, w, learns=True)
    asked = align_plain(maps, boxes, size, sampling)
    toward = random(*asked.shape)
    gradient = torch.autograd.grad(asked, maps, toward)[0]
    for dtype, near in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        own = maps.detach().to(dtype).requires_grad_()
        found = read(anchors, own, size, sampling)
        assert found.dtype == dtype and found.shape == asked.shape == (2, len(boxes), 3, size, size)
        assert torch.allclose(found.double(), asked, rtol=0, atol=near)
        again = torch.autograd.grad(found, own, toward.to(dtype))[0].double()
        assert torch.allclose(again, gradient, rtol=0, atol=near * max(1, gradient.abs().max().item()))


def _boxes(edges):
    "All boxes of the intervals, in a loop."
    return torch.tensor([[x[0], y[0], x[1], y[1]] for y in edges.tolist() for x in edges.tolist()], dtype=torch.float64)


def test_any_leading_axes_and_memory_layout():
    maps = random(2, 3, 4, 6, 10)
    down, across = (aligners(FEW, n)[0] for n in (6, 10))
    asked = align_lattice(maps, down, across)
    assert asked.shape == (2, 3, 4, 15, 15) and torch.equal(align_lattice(maps[1, 2, 3], down, across), asked[1, 2, 3])
    last = maps.flatten(0, 1).to(memory_format=torch.channels_last)
    assert torch.equal(align_lattice(last, down, across), asked.flatten(0, 1))


def test_reading_twice_gives_the_same_bits():
    maps = random(4, 8, 32, 32, dtype=torch.float32, learns=True)
    toward = random(4, 395, 8, 5, 5, dtype=torch.float32)
    one, two = (torch.autograd.grad(read(Anchors(), maps, 5, 2), maps, toward)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_what_inference_mode_has_cached_serves_training():
    aligners.cache_clear()
    head = head_of(2, 3, anchors=FEW)
    features, saliency = random(1, 1, 2, 7, 7, learns=True), random(1, 1, 7, 7)
    with torch.inference_mode():
        asked = head(features, saliency)[0].clone()
    scores, _ = head(features, saliency)
    scores.sum().backward()
    assert torch.equal(scores, asked) and features.grad.isfinite().all()


# --- chunks


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 7, 100])
@pytest.mark.parametrize("learns", [(True, True, True), (False, True, False), (True, False, False), (False, False, True)])
def test_chunks_have_the_gradients_of_the_whole(chunk, learns):
    x, y = (random(6, 3, seed=i, learns=learns[i]) for i in range(2))
    weight = random(3, 3, seed=2, learns=learns[2])

    def call(x, y):
        return ((x @ weight).tanh() * y.exp()) @ weight.mT

    found, asked = InChunks.apply(call, chunk, 2, x, y, weight), call(x, y)
    assert torch.allclose(found, asked, rtol=0, atol=1e-14)
    learning = [t for t in (x, y, weight) if t.requires_grad]
    for a, b in zip(gradients([found], learning), gradients([asked], learning)):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *_: InChunks.apply(call, chunk, 2, x, y, weight), learning)


def test_chunks_keep_nothing_and_call_as_often_as_needed():
    sizes, x = [], random(7, 3, learns=True)

    def call(part):
        sizes.append((len(part), torch.is_grad_enabled()))
        return part.sin()

    y = InChunks.apply(call, 3, 1, x)
    assert sizes == [(3, False), (3, False), (1, False)]
    y.sum().backward()
    assert sizes[3:] == [(3, True), (3, True), (1, True)]
    assert torch.equal(x.grad, x.detach().cos())


def test_a_weight_that_changed_since_is_an_error():
    x, weight = random(4, 3), random(3, 3, learns=True)
    y = InChunks.apply(lambda part: part @ weight, 2, 1, x, weight)
    with torch.no_grad():
        weight.mul_(2)  # the second computation would not be the first one
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- the head


SHAPES = [(2, 3, 6, 12, 16), (1, 5, 1, 7, 7), (3, 2, 3, 1, 9), (1, 7, 8, 32, 32), (2, 2, 16, 20, 20)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_head_is_the_plain_form(shape, dtype, near):
    features, saliency = random(*shape, dtype=dtype, learns=True), random(*shape[:2], *shape[3:], dtype=dtype, learns=True)
    head = head_of(shape[2], dtype=dtype)
    tensors = features, saliency, *head.parameters()
    asked = region_scores_plain(head, features, saliency)
    asked_gradients = gradients(asked, tensors)
    for maps in (1, 2, 100):
        head.budget = maps * 395 * 25 * shape[2]
        assert head.chunk(features.flatten(0, 1)) == maps
        found = head(features, saliency)
        assert [y.shape for y in found] == [(*shape[:2], 395), (*shape[:2], 395, 4)]
        assert all(torch.allclose(a, b, rtol=near, atol=near) for a, b in zip(found, asked))
        for a, b in zip(gradients(found, tensors), asked_gradients):
            assert torch.allclose(a, b, rtol=near, atol=near * max(1, b.abs().max().item()))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 32, 33, 31), (1, 4, 24, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_budget_changes_no_feature_and_no_score(shape, dtype):
    "Within rounding: how torch multiplies and convolves depends on the processor, on how many maps and on where they lie."

    def same(a, b):
        return torch.allclose(a, b, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)

    features, saliency = random(*shape, dtype=dtype), random(*shape[:2], *shape[3:], dtype=dtype)
    head = head_of(shape[2], 16, dtype=dtype, budget=2**40)
    with torch.no_grad():
        asked = head(features, saliency)
        flat = features.flatten(0, 1)
        gates = [x.sigmoid() for x in head.aligned(saliency.flatten(0, 1)[:, None])]
        maxima = head.maxima(flat, *gates)
        rounding = 8 * torch.finfo(dtype).eps * flat.abs().max()  # two sums of four terms each, in two orders
        for maps in range(1, shape[0] * shape[1]):
            head.budget = maps * 395 * 25 * shape[2]
            chunk = head.chunk(flat)
            assert chunk == maps
            read = zip(*map(head.aligned, flat.split(chunk)))
            assert all((torch.cat(parts) - whole).abs().max() <= rounding for parts, whole in zip(read, head.aligned(flat)))
            assert all(map(same, head(features, saliency), asked))
            assert same(InChunks.apply(head.maxima, chunk, 1 + len(gates), flat, *gates), maxima)


@pytest.mark.parametrize("budget", [1, 13 * 9 * 2 * 2, 10**6])
def test_head_by_differences(budget):
    head = head_of(2, 3, anchors=FEW, size=3, budget=budget)
    features, saliency = random(1, 3, 2, 4, 5, learns=True), random(1, 3, 4, 5, learns=True)
    assert torch.autograd.gradcheck(lambda *_: head(features, saliency), (features, saliency, *head.parameters()))


@pytest.mark.parametrize("frozen", ["features", "saliency", "maps", "head", "conv", "all but features"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    features, saliency = random(2, 3, 4, 8, 8, learns=True), random(2, 3, 8, 8, learns=True)
    head = head_of(4, anchors=FEW)
    everything = dict(features=features, saliency=saliency, **dict(head.named_parameters()))
    asked = dict(zip(everything, gradients(region_scores_plain(head, features, saliency), [*everything.values()])))
    off = {
        "features": ["features"],
        "saliency": ["saliency"],
        "maps": ["features", "saliency"],
        "head": [name for name, _ in head.named_parameters()],
        "conv": ["conv.weight", "conv.bias"],
        "all but features": [name for name in everything if name != "features"],
    }[frozen]
    for name in off:
        everything[name].requires_grad_(False)
    for budget in (1, 10**9):
        head.budget = budget
        for t in everything.values():
            t.grad = None
        y = head(features, saliency)
        torch.autograd.backward(y, [random(*t.shape, seed=9 + i) for i, t in enumerate(y)])
        for name, t in everything.items():
            assert t.grad is None if name in off else torch.allclose(t.grad, asked[name], rtol=0, atol=1e-11), name


@pytest.mark.parametrize("budget", [1, 2**40])
def test_under_autocast_scores_are_float32(budget):
    features, saliency = random(1, 3, 4, 9, 9, dtype=torch.float32, learns=True), random(1, 3, 9, 9, dtype=torch.float32)
    head = head_of(4, dtype=torch.float32, budget=budget)
    asked = head(features, saliency)
    asked_gradients = gradients(asked, [features, *head.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        y = head(features, saliency)
        inside = gradients(head(features, saliency), [features, *head.parameters()])  # backward too
        half = features.detach().bfloat16().requires_grad_()
        scores, deltas = head(half, saliency.bfloat16())
        (scores.sum() + deltas.sum()).backward()
    assert all(map(torch.equal, y, asked))
    for a, b, c in zip(gradients(y, [features, *head.parameters()]), inside, asked_gradients):
        assert torch.equal(a, c) and torch.allclose(b, c, rtol=0, atol=0.02 * c.abs().max().item())
    assert scores.dtype == deltas.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()
    wide = head(half.detach().float(), saliency.bfloat16().float())
    assert all(map(torch.equal, (scores, deltas), wide))


def test_a_new_head_refines_nothing():
    head = RegionHead(3, 4)
    scores, deltas = head(torch.randn(2, 2, 3, 8, 8), torch.randn(2, 2, 8, 8))
    assert torch.equal(decode(deltas, head.boxes), head.boxes.expand(2, 2, 395, 4))
    assert scores.std() > 0
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        "conv.weight": (4, 3, 3, 3),
        "conv.bias": (4,),
        "score.weight": (1, 4),
        "delta.weight": (4, 4),
        "delta.bias": (4,),
    }


def test_settings_and_shapes_that_do_not_fit_are_named():
    for name in ("channels", "width", "size", "sampling", "budget"):
        with pytest.raises(CxrError, match=f"{name} = 0"):
            RegionHead(**{"channels": 2, name: 0})
    head = RegionHead(2)
    for saliency in [(1, 3, 4, 5), (1, 2, 5, 4), (1, 2, 1, 4, 5), (2, 4, 5)]:
        with pytest.raises(CxrError, match=r"\(1, 2, 2, 4, 5\) and"):
            head(torch.rand(1, 2, 2, 4, 5), torch.rand(saliency))


def test_the_budget_counts_region_features():
    head = RegionHead(128)
    assert head.chunk(torch.empty(112, 128, 1, 1)) == 2**22 // (395 * 25 * 128)
    assert RegionHead(128, budget=1).chunk(torch.empty(112, 128, 1, 1)) == 1


# --- choosing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.001])
def test_one_hot_with_the_gradient_of_the_soft_draw(tau, dtype):
    scores = random(3, 5, 395, dtype=dtype, learns=True)
    toward = random(3, 5, 395, dtype=dtype, seed=1)
    torch.manual_seed(5)
    hard = pick(scores, tau)
    torch.manual_seed(5)
    soft = F.gumbel_softmax(scores, tau)
    near = torch.finfo(dtype).eps
    assert torch.allclose(hard, F.one_hot(soft.argmax(-1), 395).to(dtype), rtol=0, atol=near)
    assert hard.count_nonzero(-1).eq(1).all()
    a, b = (torch.autograd.grad(y, scores, toward, retain_graph=True)[0] for y in (hard, soft))
    assert torch.equal(a, b)
    by_hand = soft * (toward - (soft * toward).sum(-1, keepdim=True)) / tau
    assert torch.allclose(a, by_hand, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-10)


def test_draws_follow_the_softmax_at_every_temperature():
    scores, n = random(8, dtype=torch.float32), 50_000
    q = scores.softmax(0)
    for seed, tau in enumerate((1, 0.1, 0.001)):
        torch.manual_seed(seed)
        share = pick(scores.expand(n, -1), tau).mean(0)
        assert ((share - q).abs() < 5 * (q * (1 - q) / n).sqrt()).all()


def test_the_best_and_the_mixture():
    scores = random(4, 9, learns=True)
    best = pick(scores, sample=False)
    assert torch.equal(best, F.one_hot(scores.argmax(1), 9).double()) and not best.requires_grad
    for sample in (True, False):
        assert torch.equal(pick(scores, 0.01, "soft", sample), scores.softmax(1))


def test_an_unknown_choice_names_the_choices():
    with pytest.raises(CxrError, match="how = 'best'.*" + ".*".join(CHOICES)):
        pick(torch.zeros(3), how="best")
    for tau in (0, -1, math.nan):
        with pytest.raises(CxrError, match="tau = .*above 0"):
            pick(torch.zeros(3), tau)


# --- crop


def test_crop_pixel_by_pixel():
    x, size = random(2, 3, 9, 13), 4
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).double().view(2, 3, 2, 2).sort(2)[0].flatten(2)
    found = crop(x, boxes, size)
    assert found.shape == (2, 3, 3, size, size)
    for b, k, i, j in np.ndindex(2, 3, size, size):
        x0, y0, x1, y1 = boxes[b, k].tolist()
        u = min(max((x0 + (x1 - x0) * (j + 0.5) / size) * 13 - 0.5, 0), 12)
        v = min(max((y0 + (y1 - y0) * (i + 0.5) / size) * 9 - 0.5, 0), 8)
        down = [max(0, 1 - abs(v - r)) for r in range(9)]
        across = [max(0, 1 - abs(u - c)) for c in range(13)]
        down, across = (torch.tensor(t, dtype=torch.float64) for t in (down, across))
        asked = down @ x[b] @ across
        assert torch.allclose(found[b, k, :, i, j], asked, rtol=0, atol=1e-12)


def test_crop_by_differences():
    "Between the kinks of bilinear interpolation, at the centres of the pixels."
    x = random(1, 2, 7, 8, learns=True)
    boxes = torch.tensor([[[0.13, 0.18, 0.71, 0.84], [0.31, 0.06, 0.97, 0.57]]], dtype=torch.float64, requires_grad=True)
    at = (torch.arange(3).double() + 0.5) / 3
    cells = (boxes[..., :2, None] + (boxes[..., 2:, None] - boxes[..., :2, None]) * at) * torch.tensor([[8.0], [7]]) - 0.5
    assert (cells - cells.round()).abs().min() > 1e-3
    assert torch.autograd.gradcheck(lambda x, boxes: crop(x, boxes, 3), (x, boxes))


def test_a_box_outside_sees_the_border_and_feels_nothing():
    x, box = random(1, 1, 5, 5), torch.tensor([[[1.2, 1.2, 1.5, 1.6]]], dtype=torch.float64, requires_grad=True)
    seen = crop(x, box, 3)
    assert torch.allclose(seen, x[0, 0, 4, 4].expand_as(seen))
    assert torch.autograd.grad(seen.sum(), box)[0].eq(0).all()


def test_crop_of_half_an_image_in_half_precision():
    x, box = random(1, 1, 8, 8, dtype=torch.float32), torch.tensor([[[0.0, 0, 0.5, 0.5]]])
    assert torch.allclose(crop(x, box, 4)[0, 0], x[0, :, :4, :4], atol=1e-6)
    assert crop(x.double(), box, 4).dtype == torch.float64  # the type of the image


# --- all regions as one map


def painted(boxes, weights, size):
    "A plain loop in float64."
    result = np.zeros((size, size))
    for (x0, y0, x1, y1), w in zip(boxes.tolist(), weights.tolist()):
        for i, j in np.ndindex(size, size):
            down = min(y1 * size, i + 1) - max(y0 * size, i)
            across = min(x1 * size, j + 1) - max(x0 * size, j)
            result[i, j] += w * max(down, 0) * max(across, 0)
    return torch.from_numpy(result)


@pytest.mark.parametrize("size", [1, 3, 8, 13])
def test_average_in_a_loop(size):
    degenerate = torch.tensor(
        [[0, 0, 1, 1], [0.3, 0.3, 0.3, 0.9], [0.4, 0.2, 0.4, 0.2], [0.8, 0.8, 0.2, 0.2], [-1, -1, 2, 2], [1.5, 0, 2, 1]]
    )  # whole, line, point, inside out, larger than the map, beside it
    refined = decode(random(60, 4) / 3, Anchors().boxes()[::6][:60].double())
    boxes, weights = torch.cat([degenerate.double(), refined]), random(66, seed=2)
    assert torch.allclose(average_regions(boxes, weights, size), painted(boxes, weights, size), rtol=0, atol=1e-12)
    wide = average_regions(boxes.expand(2, 3, -1, -1), weights.expand(2, 3, -1), size)
    assert wide.shape == (2, 3, size, size) and torch.allclose(wide[1, 2], painted(boxes, weights, size), atol=1e-12)
    narrow = average_regions(boxes.float(), weights.float(), size)
    assert narrow.dtype == torch.float32 and torch.allclose(narrow, wide[0, 0].float(), atol=1e-4)


def test_nothing_and_empty_boxes_leave_no_mark():
    for empty in ([0.3, 0.3, 0.3, 0.9], [0.8, 0.8, 0.2, 0.2], [1.5, 0, 2, 1], [0, 0, 0, 0]):
        assert not average_regions(torch.tensor([empty]).float(), torch.ones(1), 5).any()
    assert average_regions(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 5).eq(1).all()


def test_average_by_differences():
    boxes = torch.tensor([[0.11, 0.23, 0.57, 0.81], [0.29, 0.04, 0.93, 0.47]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, w: average_regions(b, w, 4), (boxes, random(2, learns=True)))


# --- what it costs


def test_costs_have_a_row_for_each():
    costs = region_costs(8, batch=1, channels=2, width=2, classes=2)
    assert [*costs] == ["situation", "form", "seconds", "bytes"] and len(costs) == 9
    assert tuple(costs.situation.unique()) == SITUATIONS
    assert (costs.seconds > 0).all() and (costs.bytes > 0).all()


def stage_2(head, features, saliency):
    "The maps are frozen, the head learns."
    scores, deltas = head(features, saliency)
    torch.autograd.grad(scores.sum() + deltas.sum(), list(head.parameters()))
    return 1


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
def test_cost_at_the_size_of_the_paper():
    "395 regions of 14 classes, batch 8, 128 channels, stage 2: a third of the memory in 1.5 of the CPU time, at most."
    features, saliency = torch.randn(8, 14, 128, 32, 32), torch.randn(8, 14, 32, 32)
    heads = {"chunks": RegionHead(128), "whole": RegionHead(128, budget=2**62)}
    jobs = {name: lambda h=h: stage_2(h, features, saliency) for name, h in heads.items()}
    peaks = {name: peak_memory(job) for name, job in jobs.items()}
    print({k: f"{v / 2**20:.0f} MB" for k, v in peaks.items()})
    assert peaks["chunks"] * 3 <= peaks["whole"]
    assert_cheap(jobs["chunks"], jobs["whole"], 1.5)


@pytest.mark.slow
def test_memory_on_the_maps_of_the_paper(two_threads):
    "128 x 128, a stride of 4 on 512 pixels: inference on a batch of 8 beside the plain form on an eighth of it."
    features, saliency = torch.randn(8, 14, 128, 128, 128), torch.randn(8, 14, 128, 128)
    head = RegionHead(128)
    with torch.no_grad():
        ours = peak_memory(lambda: head(features, saliency))
        plain = peak_memory(lambda: region_scores_plain(head, features[:1], saliency[:1]))
    print(f"{ours / 2**20:.0f} MB for 8 images, {plain / 2**20:.0f} MB for one")
    assert ours * 3 <= 8 * plain and ours <= 0.2 * features.nbytes
