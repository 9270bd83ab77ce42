"Boxes, overlaps and scores against plain float64 loops; thresholds that see no test box; controls; speed is no test."

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cxr_book.classification import auroc, operate, operating_points, patient_weights, summarise
from cxr_book.controls import grad_cam, mean_boxes, score_controls
from cxr_book.core import FINDINGS, CxrError
from cxr_book.evaluation import GRID, Predictions, evaluate, heat_of, iou_by_threshold, pairs_of, score_at, score_pairs
from cxr_book.evaluation import thresholds_for
from cxr_book.localization import PAPER_RULES, BoxRule, box_patches, cdice, cover, detect, energy, iobb, iou, otsu
from cxr_book.localization import pointing, region_overlaps, score, to_heat, to_image_frame

RULES = ("contours", "largest", "union", "patches")
quick = settings(max_examples=60, deadline=None)
unit = st.floats(0, 1, width=32)


@st.composite
def heats(draw, dtype=np.float64):
    "One map of a few cells, coarse levels so that ties and several pieces are common."
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return draw(arrays(np.int64, shape, elements=st.integers(0, 4))).astype(dtype) / 4


@st.composite
def boxes_(draw):
    x0, x1 = sorted((draw(unit), draw(unit)))
    y0, y1 = sorted((draw(unit), draw(unit)))
    return np.array([x0, y0, x1, y1], np.float64)


# ---- plain versions ----


def plain_pieces(hot):
    "Connected pieces by flood fill, corners count, in the order of their first cell."
    h, w = hot.shape
    seen, pieces = set(), []
    for start in [(i, j) for i in range(h) for j in range(w) if hot[i, j]]:
        if start in seen:
            continue
        piece, stack = [], [start]
        seen.add(start)
        while stack:
            i, j = stack.pop()
            piece.append((i, j))
            for a in range(max(i - 1, 0), min(i + 2, h)):
                for b in range(max(j - 1, 0), min(j + 2, w)):
                    if hot[a, b] and (a, b) not in seen:
                        seen.add((a, b))
                        stack.append((a, b))
        pieces.append(piece)
    return pieces


def plain_box(cells, shape):
    i, j = [c[0] for c in cells], [c[1] for c in cells]
    return [min(j) / shape[1], min(i) / shape[0], (max(j) + 1) / shape[1], (max(i) + 1) / shape[0]]


def enclosed(piece, hot):
    "Does the piece lie in a hole of another, so that it has no outer contour of its own?"
    h, w = hot.shape
    reach, stack = set(), [(i, j) for i in range(-1, h + 1) for j in range(-1, w + 1) if i in (-1, h) or j in (-1, w)]
    reach.update(stack)
    while stack:  # the cold outside, in 4-connection
        i, j = stack.pop()
        for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if -1 <= a <= h and -1 <= b <= w and (a, b) not in reach:
                if not (0 <= a < h and 0 <= b < w and hot[a, b]):
                    reach.add((a, b))
                    stack.append((a, b))
    return not any((i + di, j + dj) in reach for i, j in piece for di, dj in ((0, 1), (0, -1), (1, 0), (-1, 0)))


def plain_share(box, i, j, shape):
    "Share of the cell that the box covers."
    y = min(box[3] * shape[0], i + 1) - max(box[1] * shape[0], i)
    x = min(box[2] * shape[1], j + 1) - max(box[0] * shape[1], j)
    return max(y, 0.0) * max(x, 0.0)


def plain_overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0.0) * max(h, 0.0)
    one, two = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return both / (one + two - both) if one + two - both > 0 else 0.0, both / one if one > 0 else 0.0


# ---- heat ----


@quick
@given(arrays(np.float32, (2, 4, 5), elements=st.floats(-100, 100, width=16)))
def test_heat_is_in_range_and_hot_at_the_maximum(maps):
    for how in ("minmax", "relu-max", "sigmoid"):
        heat = to_heat(maps, how)
        assert ((heat >= 0) & (heat <= 1)).all()
        for m, a in zip(maps, heat):
            if how != "sigmoid" and (m.min() == m.max() or how == "relu-max" and m.max() <= 0):
                assert (a == 0).all()
            else:
                assert a.flat[m.argmax()] == a.max() and (how == "sigmoid" or a.max() == 1)


def test_unknown_names_are_refused():
    with pytest.raises(CxrError, match="minmax"):
        to_heat(np.zeros((1, 2, 2)), "max")
    with pytest.raises(CxrError, match="largest"):
        detect(np.zeros((1, 2, 2)), "biggest", 0.5)
    with pytest.raises(CxrError, match="threshold"):
        BoxRule(threshold=-0.1)


@pytest.mark.parametrize("size", [7, 14, 24, 56])
def test_image_frame_is_plain_interpolation_for_the_identity(size):
    maps = torch.rand(3, 2, 7, 7)
    got = to_image_frame(maps, torch.eye(3).expand(3, 3, 3), size)
    want = torch.nn.functional.interpolate(maps, (size, size), mode="bilinear", align_corners=False)
    assert torch.allclose(got, want, atol=1e-5)


def test_image_frame_undoes_a_crop():
    "A hot cell of a centre crop lands where the crop came from, in an image that has no symmetry."
    crop = torch.tensor([[0.5, 0, 0.25], [0, 0.5, 0.125], [0, 0, 1]])
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 3, 0] = 1  # x 0..0.25, y 0.75..1 of the crop
    heat = to_image_frame(maps, crop[None], 32, "nearest").numpy()[0]
    found = detect(heat, "largest", 0.5).boxes[0]
    assert np.allclose(found, [0.25, 0.125 + 0.375, 0.25 + 0.125, 0.125 + 0.5])
    assert heat[0, :4].sum() == 0 and heat[0, :, 24:].sum() == 0


def test_one_view_for_all_maps_and_views_of_their_own_are_the_same():
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.random((4, 2, 9, 9), dtype=np.float32))
    views = torch.tensor([[0.7, 0, 0.1], [0, 0.8, 0.15], [0, 0, 1.0]]).repeat(4, 1, 1)
    together = to_image_frame(maps, views, 40)
    views[3, 0, 2] = 0.2
    apart = to_image_frame(maps, views, 40)
    assert torch.allclose(apart[:3], together[:3], atol=1e-6) and not torch.allclose(apart[3], together[3], atol=1e-2)
    for i in range(4):
        assert torch.allclose(to_image_frame(maps[i : i + 1], views[i : i + 1], 40)[0], apart[i], atol=1e-6)


def test_nothing_leaks_over_the_edge_of_the_view():
    "The left half of the image was seen: bilinear heat must end exactly there, at full strength."
    half = torch.tensor([[[0.5, 0, 0], [0, 1, 0], [0, 0, 1.0]]])
    heat = to_image_frame(torch.ones(1, 1, 4, 4), half, 64)[0, 0]
    assert (heat[:, :32] == 1).all() and (heat[:, 32:] == 0).all()


# ---- rules ----


@quick
@given(heats(), st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0)))
def test_rules_equal_plain_loops(heat, t):
    hot = (heat >= t) & (heat > 0)
    pieces, found = plain_pieces(hot), {rule: detect(heat[None], rule, t) for rule in RULES}
    assert np.array_equal(found["patches"].regions[0], hot) and np.array_equal(found["contours"].regions[0], hot)
    if not pieces:
        assert all(len(f.boxes) == 0 for f in found.values())
        return
    assert np.allclose(found["union"].boxes, [plain_box([c for p in pieces for c in p], heat.shape)])
    sizes = [len(p) for p in pieces]
    biggest = [p for p in pieces if len(p) == max(sizes)]
    assert any(np.allclose(found["largest"].boxes[0], plain_box(p, heat.shape)) for p in biggest)
    assert any(found["largest"].regions[0][tuple(zip(*p))].all() for p in biggest)
    assert found["largest"].regions.sum() == max(sizes)
    outer = [plain_box(p, heat.shape) for p in pieces if not enclosed(p, hot)]
    assert np.allclose(sorted(found["contours"].boxes.tolist()), sorted(outer))
    top = np.unravel_index(heat.argmax(), heat.shape)
    x0, y0, x1, y1 = found["contours"].boxes[0]
    assert x0 <= (top[1] + 0.5) / heat.shape[1] <= x1 and y0 <= (top[0] + 0.5) / heat.shape[0] <= y1


def test_the_largest_piece_may_lie_in_the_hole_of_another():
    heat = np.zeros((3, 64, 64), np.float32)
    cv2.rectangle(heat[0], (4, 4), (59, 59), 1.0)  # a thin frame, and a block in it that has more cells
    heat[0, 20:45, 20:45] = 1
    heat[1] = 1
    heat[1, 10:50, 10:50] = 0  # a thick frame, and a smaller block
    heat[1, 25:35, 25:35] = 1
    heat[2, 10:20, 10:20] = heat[2, 40:50, 40:50] = 1  # two of one size: the first
    found = detect(heat, "largest", 0.5)
    want = np.array([[20, 20, 45, 45], [0, 0, 64, 64], [10, 10, 20, 20]]) / 64
    assert np.allclose(found.boxes, want) and found.regions.sum((1, 2)).tolist() == [625, 64 * 64 - 1600, 100]


@pytest.mark.parametrize("side", [40, 520])  # more cells than 16 bits could count pieces in
def test_the_largest_piece_of_noise_is_that_of_a_plain_labelling(side):
    heat = np.random.default_rng(side).random((3, side, side), dtype=np.float32)
    found = detect(heat, "largest", 0.6)
    for i in range(3):
        n, labels, stats, _ = cv2.connectedComponentsWithStats((heat[i] >= 0.6).astype(np.uint8), connectivity=8)
        k = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
        assert n > 2 and (found.regions[i] == (labels == k)).all()
        x, y, w, h = stats[k, :4]
        assert np.allclose(found.boxes[i] * side, [x, y, x + w, y + h])


def test_a_stack_equals_its_maps_one_by_one():
    rng = np.random.default_rng(1)
    heat = np.array([cv2.GaussianBlur(m, (0, 0), 2) for m in rng.random((30, 24, 20))])
    heat = to_heat(heat)
    cut = rng.uniform(0.3, 1.1, 30)
    for rule in RULES:
        stack, n = detect(heat, rule, cut), 0
        for i in range(30):
            one = detect(heat[i : i + 1], rule, cut[i])
            assert np.array_equal(stack.boxes[stack.owner == i], one.boxes), rule
            assert np.array_equal(stack.regions[i], one.regions[0])
            n += len(one.boxes)
        assert n == len(stack.boxes) and (np.diff(stack.owner) >= 0).all()


def test_otsu_is_opencvs():
    rng = np.random.default_rng(0)
    heat = to_heat(np.array([cv2.GaussianBlur(m, (0, 0), 1.5) for m in rng.random((10, 16, 16))]))
    for a, t in zip(heat, otsu(heat)):
        levels = np.round(a * 255).astype(np.uint8)
        want = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]
        assert np.array_equal(levels / 255 >= t, want > 0)


# ---- overlaps ----


@quick
@given(boxes_(), boxes_())
def test_box_ratios_equal_plain_versions(a, b):
    want = plain_overlap(a, b)
    assert np.isclose(iou(a, b), want[0], atol=1e-12) and np.isclose(iobb(a, b), want[1], atol=1e-12)
    assert np.isclose(iou(a, b), iou(b, a)) and 0 <= iou(a, b) <= 1 + 1e-12
    if (a[2] - a[0]) * (a[3] - a[1]) > 1e-6:
        assert np.isclose(iou(a, a), 1) and np.isclose(iobb(a, a), 1)


def test_iou_equals_torchvisions():
    rng = np.random.default_rng(0)
    a, b = np.sort(rng.random((2, 200, 2, 2)), 2).reshape(2, 200, 4)
    want = torchvision.ops.box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert np.allclose(iou(a[:, None], b), want, atol=1e-12)


@quick
@given(heats(), boxes_(), st.sampled_from((0.25, 0.5, 1.0)))
def test_region_and_heat_scores_equal_plain_loops(heat, box, t):
    h, w = heat.shape
    share = [[plain_share(box, i, j, heat.shape) for j in range(w)] for i in range(h)]
    cells = [(i, j) for i in range(h) for j in range(w)]
    truth = cover(box, heat.shape)
    assert np.allclose(truth[0], share, atol=1e-9)
    area = (box[2] - box[0]) * (box[3] - box[1]) * h * w
    both = sum(share[i][j] for i, j in cells if heat[i, j] >= t)
    n = sum(heat[i, j] >= t for i, j in cells)
    got_iou, got_ior = region_overlaps((heat >= t)[None], truth)
    assert np.isclose(got_iou[0], both / (n + area - both) if n + area - both > 0 else 0, atol=1e-9)
    assert np.isclose(got_ior[0], both / n if n else 0, atol=1e-9)
    inside = sum(heat[i, j] * share[i][j] for i, j in cells)
    total, squares = sum(heat[i, j] for i, j in cells), sum(heat[i, j] ** 2 for i, j in cells)
    assert np.isclose(energy(heat[None], truth)[0], inside / total if total else 0, atol=1e-9)
    want = 2 * inside / (squares + area) if squares + area > 0 else 0
    assert np.isclose(cdice(heat[None], truth)[0], want, atol=1e-9)
    best = max(cells, key=lambda c: heat[c])
    x, y = (best[1] + 0.5) / w, (best[0] + 0.5) / h
    hit = heat.max() > 0 and box[0] <= x <= box[2] and box[1] <= y <= box[3]
    assert pointing(heat[None], box[None])[0] == hit


def test_cdice_is_the_formula_for_a_mask():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 6, 7)), (rng.random((4, 6, 7)) < 0.3).astype(float)
    want = 2 * (a * b).sum((1, 2)) / (a**2 + b**2).sum((1, 2))
    assert np.allclose(cdice(a, b), want, atol=1e-12)


@quick
@given(boxes_(), st.integers(1, 8), st.integers(1, 8))
def test_box_patches_equal_a_plain_loop(box, h, w):
    got = box_patches(box, (h, w))[0]
    ys = [i for i in range(h) if box[1] <= (i + 0.5) / h <= box[3]]
    xs = [j for j in range(w) if box[0] <= (j + 0.5) / w <= box[2]]
    ys = ys or [min(int((box[1] + box[3]) / 2 * h), h - 1)]
    xs = xs or [min(int((box[0] + box[2]) / 2 * w), w - 1)]
    assert {(i, j) for i, j in zip(*np.nonzero(got))} == {(i, j) for i in ys for j in xs}


def test_false_positives_by_hand():
    "Three pieces, truth around one: a hit and two false; truth elsewhere: three; T = 0.6, a piece half true: three."
    heat = np.zeros((3, 8, 8))
    for y, x in ((0, 0), (0, 4), (6, 6)):
        heat[:, y : y + 2, x : x + 2] = 0.9
    heat[:, 6, 6] = 1.0
    boxes = np.array([[0, 0, 0.25, 0.25], [0, 0.5, 0.2, 0.7], [0, 0, 0.125, 0.25]])
    found = detect(heat, "contours", 0.5)
    assert np.bincount(found.owner).tolist() == [3, 3, 3]
    values = score(heat, found, boxes)
    assert values["FP"].tolist() == [2, 3, 2] and values["Lacc"].tolist() == [1, 0, 1]
    assert values["IoU"].tolist() == [0, 0, 0], "the first box is the hottest, and it misses"
    strict = score(heat, found, boxes, t_iobb=0.6)
    assert strict["FP"].tolist() == [2, 3, 3] and strict["Lacc"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_score_of_a_stack_equals_a_plain_loop(rule):
    "Boxes and metrics of many maps are those of a loop over maps with plain code."
    rng = np.random.default_rng(3)
    noise = np.array([cv2.GaussianBlur(m, (0, 0), 3) for m in rng.normal(size=(40, 32, 32))])
    heat = to_heat(noise).astype(np.float64)
    boxes = np.sort(rng.random((40, 2, 2)), 1).reshape(40, 4)
    found = detect(heat, rule, 0.7)
    values = score(heat, found, boxes)
    for i in range(40):
        mine = found.boxes[found.owner == i]
        ratios = [plain_overlap(a, boxes[i]) for a in mine]
        if rule != "patches":
            assert np.isclose(values["IoU"][i], ratios[0][0]) and np.isclose(values["IoBB"][i], ratios[0][1])
            assert values["Lacc"][i] == any(r[1] > 0.1 for r in ratios)
            assert values["FP"][i] == sum(r[1] <= 0.1 for r in ratios)
        share = np.array([[plain_share(boxes[i], y, x, (32, 32)) for x in range(32)] for y in range(32)])
        region = found.regions[i]
        assert np.isclose(values["IoR"][i], share[region].sum() / region.sum())
        assert np.isclose(values["energy"][i], (heat[i] * share).sum() / heat[i].sum())
        for t in (0.1, 0.3, 0.5, 0.6):
            assert values[f"T(IoU)={t}"][i] == (values["IoU"][i] >= t)


# ---- evaluation ----


def made(n=48, seed=0, masks=None):
    "A small data set whose maps are blobs near the truth; patients of two images each."
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 4 * 2
    xy, half = rng.uniform(0.3, 0.7, (n, 2)), rng.uniform(0.05, 0.2, (n, 2))
    boxes = pd.DataFrame(np.c_[xy - half, xy + half], columns=["x0", "y0", "x1", "y1"])
    boxes.insert(0, "finding", kind)
    boxes.insert(0, "row", np.arange(n))
    grid = (np.arange(16) + 0.5) / 16
    maps = rng.normal(size=(n, 14, 16, 16)).astype(np.float32) * 0.1
    for i in range(n):
        gap = ((grid - xy[i, 0]) / half[i, 0])[None, :] ** 2 + ((grid - xy[i, 1]) / half[i, 1])[:, None] ** 2
        maps[i, kind[i]] += np.exp(-gap)
    labels = np.eye(14, dtype=np.uint8)[kind]
    table = pd.DataFrame({"patient": [f"p{i // 2}" for i in range(n)]})
    data = SimpleNamespace(table=table, labels=labels, boxes=boxes, masks=masks or {})
    rows = np.arange(n)
    eye = np.tile(np.eye(3, dtype=np.float32), (n, 1, 1))
    part = lambda r: Predictions(r, rng.normal(size=(len(r), 14)), maps[r], r, eye[r])
    return data, part(rows[: n // 2]), part(rows[n // 2 :])


def test_poisoned_test_boxes_do_not_reach_validated_thresholds():
    data, test, valid = made()
    bad = SimpleNamespace(**vars(data) | {"boxes": data.boxes.copy()})
    bad.boxes.loc[bad.boxes["row"] < 24, ["x0", "y0", "x1", "y1"]] = [0.0, 0.0, 1.0, 1.0]
    without = [SimpleNamespace(**vars(d) | {"boxes": d.boxes[d.boxes["row"] < 24]}) for d in (data, bad)]
    for clean, poisoned in ((data, bad), without):
        one, two = (evaluate(test, d, BoxRule(size=32), validation=valid, n_boot=20) for d in (clean, poisoned))
        for mode in ("fixed", "validated"):
            assert one["modes"][mode]["thresholds"] == two["modes"][mode]["thresholds"]
            assert one["modes"][mode]["source"] == two["modes"][mode]["source"]
        assert one["modes"]["oracle"]["thresholds"] != two["modes"]["oracle"]["thresholds"]
        assert one["modes"]["oracle"]["source"]["Atelectasis"] == "TEST boxes"
    assert one["modes"]["validated"]["source"]["Atelectasis"] == "validation maps (Otsu)"


@pytest.mark.parametrize("name", PAPER_RULES)
def test_every_papers_rule_is_evaluated(name):
    data, test, valid = made()
    result = evaluate(test, data, PAPER_RULES[name], validation=valid, n_boot=30)
    json.dumps(result)
    for mode in result["modes"].values():
        for metric, table in mode["metrics"].items():
            for cell in table.values():
                assert cell["low"] - 1e-9 <= cell["value"] <= cell["high"] + 1e-9 or cell["n"] < 8, metric
    iou_ = {m: result["modes"][m]["metrics"]["IoU"] for m in result["modes"]}
    for f in ("Atelectasis", "Effusion", "Mass", "Pneumonia"):  # the oracle's grid holds neither Otsu nor Otsu's mean
        assert iou_["oracle"][f]["value"] >= iou_["validated"][f]["value"] - 1e-9
    assert ("IoU (patches)" in result["modes"]["fixed"]["metrics"]) == (name == "003")


def test_without_boxes_there_is_still_an_auroc():
    data, test, _ = made()
    data.boxes = data.boxes[:0]
    result = evaluate(test, data, PAPER_RULES["001"], n_boot=10)
    assert result["modes"] == {} and result["n_pairs"] == 0 and np.isfinite(result["auroc"]["Mean"]["value"])
    assert set(result["absent"]) == set(FINDINGS) - {"Atelectasis", "Effusion", "Mass", "Pneumonia"}


def test_otsu_of_validation_maps_uses_labelled_images_only():
    data, test, valid = made()
    data.boxes = data.boxes[data.boxes["row"] < 24]
    chosen, source = thresholds_for("validated", test, data, BoxRule(size=None), valid)
    at = np.flatnonzero(data.labels[valid.map_rows, 4])
    want = otsu(heat_of(valid, at, np.full(len(at), 4), BoxRule(size=None))).mean()
    assert np.isclose(chosen["Mass"], want)
    assert source["Mass"].startswith("validation maps") and source["Edema"] == "rule"


@pytest.mark.parametrize("name", PAPER_RULES)
def test_thresholds_tried_together_equal_one_after_the_other(name, tmp_path):
    data, test, _ = made()
    rule, pairs = PAPER_RULES[name], pairs_of(data, test.map_rows)
    curve = iou_by_threshold(test, pairs, rule, GRID)
    for j in (0, 7, 18):
        heat = heat_of(test, pairs.at, pairs.finding, rule)
        plain = score(heat, detect(heat, rule.rule, GRID[j]), pairs.boxes)["IoU"]
        assert np.allclose(curve[:, j], plain, atol=1e-6), GRID[j]
    mask = tmp_path / "mask.png"
    cv2.imwrite(str(mask), 255 * np.eye(64, dtype=np.uint8))
    masks = {"Atelectasis": [mask if i % 3 else None for i in range(len(data.labels))]}
    cuts = {"high": np.full(len(pairs.at), 0.8), "low": np.linspace(0.1, 0.6, len(pairs.at)), "own": None}
    for mode, found in score_at(test, pairs, rule, cuts, masks).items():
        alone = score_pairs(test, pairs, rule, cuts[mode], masks)
        assert all(np.array_equal(found[m], alone[m], equal_nan=True) for m in alone) and [*found] == [*alone]


def test_exact_masks(tmp_path):
    "A mask that is the box's left half: a perfect box has mask IoU 1/2."
    data, test, _ = made(8)
    files = []
    for line in data.boxes.itertuples():
        mask = np.zeros((64, 64), np.uint8)
        x0, y0, x1, y1 = np.round(np.array([line.x0, line.y0, line.x1, line.y1]) * 32).astype(int) * 2
        data.boxes.loc[line.Index, ["x0", "y0", "x1", "y1"]] = np.array([x0, y0, x1, y1]) / 64
        mask[y0:y1, x0 : (x0 + x1) // 2] = 255
        cv2.imwrite(str(tmp_path / f"{line.row}.png"), mask)
        files.append(tmp_path / f"{line.row}.png")
    data.masks = {"Atelectasis": [f if i % 4 == 0 else None for i, f in enumerate(files)], "heart": files}
    pairs = pairs_of(data, test.map_rows)
    metrics = evaluate(test, data, BoxRule(size=64), n_boot=10, boxes=pairs.boxes)["modes"]["given"]["metrics"]
    assert np.isclose(metrics["mask IoU"]["Atelectasis"]["value"], 0.5) and metrics["IoU"]["Mean"]["value"] == 1
    assert metrics["mask IoU"]["Effusion"]["n"] == 0 and np.isnan(metrics["mask IoU"]["Effusion"]["value"])
    assert 0 < metrics["mask energy"]["Atelectasis"]["value"] < metrics["energy"]["Atelectasis"]["value"]


def test_the_mask_game_knows_x_from_y(tmp_path):
    "One hot cell at x = 0.8, y = 0.2; one mask there, one mirrored along the diagonal."
    data, test, _ = made(8)
    test.maps[:] = 0
    test.maps[:, :, 3, 12] = 1
    hit, miss = np.zeros((2, 60, 60), np.uint8)
    hit[9:18, 45:51], miss[45:51, 9:18] = 255, 255
    for name, mask in (("hit", hit), ("miss", miss)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
        data.masks = {"Atelectasis": [tmp_path / f"{name}.png"] * 8}
        metrics = evaluate(test, data, BoxRule(size=64), ("fixed",), n_boot=5)["modes"]["fixed"]["metrics"]
        assert metrics["mask pointing"]["Atelectasis"]["value"] == (name == "hit")


def test_the_mean_box_leaves_out_the_whole_patient():
    data, test, _ = made()
    data.table["patient"] = [f"p{i // 8}" for i in range(48)]  # two boxes of each finding a patient
    pairs = pairs_of(data, np.arange(24))
    boxes, _ = mean_boxes(data, pairs)
    for i in range(24):
        others = [j for j in range(24) if pairs.finding[j] == pairs.finding[i] and j // 8 != i // 8]
        assert np.allclose(boxes[i], pairs.boxes[others].mean(0))


def test_bootstrap_equals_a_plain_loop_over_patients():
    rng = np.random.default_rng(0)
    patients, finding, v = np.repeat(np.arange(15), 3), rng.integers(0, 3, 45), rng.random(45)
    position, counts = patient_weights(patients, 50, seed=4)
    assert (counts.sum(1) == 15).all()
    micro, macro = [], []
    for b in range(50):
        drawn = np.concatenate([np.repeat(np.flatnonzero(position == p), counts[b, p]) for p in range(15)])
        micro.append(v[drawn].mean())
        macro.append(np.mean([v[drawn][finding[drawn] == k].mean() for k in range(3) if (finding[drawn] == k).any()]))
    table = summarise({"IoU": v}, finding, patients, 50, seed=4)["IoU"]
    for name, draws in (("Micro", micro), ("Mean", macro)):
        assert np.allclose([table[name]["low"], table[name]["high"]], np.percentile(draws, (2.5, 97.5)))


@quick
@given(st.integers(0, 10**6), st.integers(2, 40), st.booleans())
def test_auroc_counts_pairs(seed, n, coarse):
    rng = np.random.default_rng(seed)
    y, s, w = rng.random((n, 1)) < 0.5, rng.random((n, 1)), rng.integers(0, 3, (1, n))
    s = (s * 3).round() if coarse else s
    wins = total = 0.0
    for i in range(n):
        for j in range(n):
            if y[i] and not y[j]:
                total += w[0, i] * w[0, j]
                wins += w[0, i] * w[0, j] * ((s[i, 0] > s[j, 0]) + 0.5 * (s[i, 0] == s[j, 0]))
    got = auroc(y, s, w)[0, 0]
    assert np.isclose(got, wins / total) if total else np.isnan(got)


# ---- controls ----


def test_controls_know_nothing_of_the_image():
    data, test, _ = made()
    a = score_controls(test, data, BoxRule(size=32), np.arange(24, 48), n_boot=20)
    blind = Predictions(test.rows, test.logits, 0 * test.maps, test.map_rows, test.affine)
    b = score_controls(blind, data, BoxRule(size=32), np.arange(24, 48), n_boot=20)
    assert json.dumps(a) == json.dumps(b) and list(a) == ["random", "centre", "mean box"]
    ours = evaluate(test, data, BoxRule(size=32), n_boot=20)["modes"]["fixed"]["metrics"]["IoU"]["Mean"]["value"]
    assert ours > max(next(iter(r["modes"].values()))["metrics"]["IoU"]["Mean"]["value"] for r in a.values())


def test_grad_cam_equals_one_backward_per_sample_and_class():
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Tanh())
    pool = torch.nn.AdaptiveAvgPool2d(1)
    head = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Tanh(), pool, torch.nn.Flatten())

    class Method(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x):
            f = self.body(x)
            return SimpleNamespace(logits=self.head(f), maps=None, extras={"features": f})

    method, x = Method().double(), torch.randn(3, 1, 9, 9, dtype=torch.float64)
    got = grad_cam(method, x)
    for i in range(3):
        for k in range(5):
            f = body(x[i : i + 1]).detach().requires_grad_()
            head(f)[0, k].backward()
            want = (f.grad.mean((2, 3), keepdim=True) * f).sum(1).relu()[0]
            assert torch.allclose(got[i, k], want, atol=1e-14)
    assert all(p.grad is None for p in body.parameters())


# ---- real boxes ----

REAL = Path(__file__).parents[1] / ".." / "shared" / "chestxray14"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/chestxray14")
def test_real_boxes_and_the_mean_box():
    "984 pairs of 726 patients; the mean box knows where hearts are and not where nodules are."
    from cxr_book.data import read

    data = read(REAL)
    rows = np.unique(data.boxes["row"].to_numpy())
    eye = np.tile(np.eye(3, dtype=np.float32), (len(rows), 1, 1))
    blank = Predictions(rows, np.zeros((len(rows), 14)), np.zeros((len(rows), 14, 2, 2), np.float32), rows, eye)
    pairs = pairs_of(data, rows)
    assert len(pairs.at) == 984 and len(np.unique(pairs.patient)) == 726
    boxes, source = mean_boxes(data, pairs)
    assert set(source.values()) == {"evaluated boxes, leaving out the patient"}
    result = evaluate(blank, data, BoxRule(size=32), n_boot=50, boxes=boxes)["modes"]["given"]["metrics"]["IoU"]
    assert result["Cardiomegaly"]["value"] > 0.6 > 0.05 > result["Nodule"]["value"]
    assert result["Micro"]["n"] == 984


# ---------------------------------------------------------------- operating points


def test_operating_points_are_the_best_of_all_thresholds():
    rng = np.random.default_rng(3)
    y = rng.random((80, 3)) < 0.4
    scores = np.round(rng.normal(size=y.shape) + y, 1)  # many ties
    cuts = operating_points(y, scores)
    reached = np.sum(operate(y, scores, cuts), 0)
    for k in range(3):
        every = [np.mean(scores[y[:, k], k] >= t) + np.mean(scores[~y[:, k], k] < t) for t in np.arange(-4, 5, 0.05)]
        assert np.isclose(reached[k], max(every))
        assert not np.isclose(scores[:, k], cuts[k]).any()  # between two scores


def test_a_class_with_one_side_has_no_operating_point():
    y, scores = np.array([[0, 1], [0, 1], [0, 0]]), np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.1]])
    cuts = operating_points(y, scores)
    sensitivity, specificity = operate(y, scores, cuts)
    assert np.isnan([cuts[0], sensitivity[0], specificity[0]]).all()
    assert (sensitivity[1], specificity[1]) == (1, 1)
    absent = operate(np.zeros((3, 2)), scores, cuts)  # chosen where the class was, asked where it is not
    assert np.isnan(absent[0][1]) and np.isfinite(absent[1][1])
