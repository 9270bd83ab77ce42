"The page with the threshold: its numbers are the package's, its data have the form that it reads."

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_book import evaluation
from cxr_book.localization import detect, energy, iobb, iou, otsu, pointing, score, to_image_frame

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "assets" / "explorer.js"
NODE = shutil.which("node")
RULES = ("largest", "contours", "union", "patches")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not on the PATH; it runs the page's JavaScript")

PROGRAM = """
const CXR = require(process.argv[1]);
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const answers = cases.map(({ call, bytes, heat, size, rules, cuts, boxes, kind }) => {
  const map = heat && (kind === "float64" ? Float64Array : Float32Array).from(heat);
  if (call === "upsample") return Array.from(CXR.upsample(CXR.decode(bytes), size));
  if (call === "best") return CXR.bestOf(heat);
  if (call === "curve") return CXR.curve(map, size, rules[0], boxes[0]);
  const found = rules.map((rule) => cuts.map((cut) => CXR.detect(map, size, rule, cut)));
  return {
    otsu: CXR.otsu(map),
    boxes: found.map((row) => row.map((f) => f.boxes)),
    cells: found.map((row) => row.map((f) => Array.from(f.region))),
    scores: found.map((row) => row.map((f) => boxes.map((box) => CXR.score(map, size, f, box)))),
  };
});
process.stdout.write(JSON.stringify(answers));
"""


def node(cases):
    "What the page's functions answer to each case."
    command = [NODE, "-e", PROGRAM, str(SCRIPT)]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def smooth(draw, size, n):
    "Maps with a few soft blobs, as a network gives them."
    coarse = torch.from_numpy(draw.random((n, 1, 6, 6), np.float32))
    heat = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[:, 0].numpy()
    return (heat - heat.min((1, 2), keepdims=True)) / np.ptp(heat, axis=(1, 2), keepdims=True)


def some_maps(size, n, seed):
    "Blobs, and maps of few levels with many pieces, holes and ties; one is cold, one is flat."
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 4, (n, size, size)).astype(np.float32) / 3
    sparse = (draw.random((n, size, size)) < 0.3).astype(np.float32) * draw.choice([0.5, 0.75, 1], (n, size, size))
    flat = np.stack([np.zeros((size, size)), np.full((size, size), 0.4)])
    return np.concatenate([smooth(draw, size, n), coarse, sparse, flat]).astype(np.float32)


def some_boxes(n, seed):
    corners = np.sort(np.random.default_rng(seed).random((n, 2, 2)), 1)
    return corners.reshape(n, 4)


def test_maps_are_enlarged_as_in_the_package():
    bytes_ = np.random.default_rng(0).integers(0, 256, (4, 32, 32)).astype(np.uint8)
    cases = [dict(call="upsample", bytes=base64.b64encode(m.tobytes()).decode(), size=128) for m in bytes_]
    got = np.array(node(cases)).reshape(4, 128, 128)
    maps = torch.from_numpy(bytes_[:, None].astype(np.float32) / 255)
    want = to_image_frame(maps, torch.eye(3).expand(4, 3, 3), 128)[:, 0].numpy()
    assert np.abs(got - want).max() < 1e-6


@pytest.mark.parametrize("size, n", [(7, 25), (16, 25), (128, 3)])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_boxes_regions_and_scores_are_the_packages(size, n, kind):
    heats, cuts = some_maps(size, n, size).astype(kind), [0.0, 0.2, 1 / 3, 0.5, 0.613, 1.0]
    truths = some_boxes(3, size)
    how = dict(call="all", size=size, rules=RULES, cuts=cuts, boxes=truths.tolist(), kind=kind)
    answers = node([how | dict(heat=h.ravel().tolist()) for h in heats])
    cut = otsu(heats)
    for h, t, answer in zip(heats, cut, answers):
        assert answer["otsu"] == t
        for i, rule in enumerate(RULES):
            for j, level in enumerate(cuts):
                found, boxes = detect(h[None], rule, level), np.array(answer["boxes"][i][j]).reshape(-1, 4)
                assert np.array_equal(np.array(answer["cells"][i][j]).reshape(size, size), found.regions[0])
                assert np.array_equal(boxes[:1], found.boxes[:1])
                assert sorted(boxes.tolist()) == sorted(found.boxes.tolist())
                check_scores(h, found, truths, answer["scores"][i][j])


def check_scores(heat, found, truths, answers):
    wide = heat[None].astype(np.float64)
    for box, got in zip(truths, answers):
        want = {name: value[0] for name, value in score(wide, found, box[None]).items()}
        for name in ("IoU", "IoBB", "energy"):
            assert abs(got[name] - want[name]) < 1e-6, name
        assert got["hit"] == want["T(IoU)=0.3"] and got["pointing"] == want["pointing"]
        if len(found.boxes):
            assert abs(got["IoU"] - iou(found.boxes[0], box)) < 1e-12
            assert abs(got["IoBB"] - iobb(found.boxes[0], box)) < 1e-12
        assert got["pointing"] == pointing(wide, box[None])[0]



def detect_cover(box, heat):
    "Share of each cell in the box, counted on a grid 20 times as fine."
    fine = 20
    size = len(heat) * fine
    at = (np.arange(size) + 0.5) / size
    rows, columns = (at >= box[1]) & (at <= box[3]), (at >= box[0]) & (at <= box[2])
    return (rows.reshape(-1, fine).mean(1)[:, None] * columns.reshape(-1, fine).mean(1))[None]
