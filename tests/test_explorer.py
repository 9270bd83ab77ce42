"The page with the threshold: its numbers are the package's, its data have the form that it reads."

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cxr_book.core import FINDINGS, read_json
from cxr_book.gallery import CHOSEN, as_script, check_explorer
from cxr_book.localization import detect, otsu, overlaps, score, to_image_frame

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "assets" / "explorer.js"
NODE = shutil.which("node")
RULES = ("largest", "contours", "union", "patches")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_node = pytest.mark.skipif(NODE is None, reason="node is not on the PATH; it runs the page's JavaScript")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; it draws the page")

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


@in_node
def test_maps_are_enlarged_as_in_the_package():
    bytes_ = np.random.default_rng(0).integers(0, 256, (4, 32, 32)).astype(np.uint8)
    cases = [dict(call="upsample", bytes=base64.b64encode(m.tobytes()).decode(), size=128) for m in bytes_]
    got = np.array(node(cases)).reshape(4, 128, 128)
    maps = torch.from_numpy(bytes_[:, None].astype(np.float32) / 255)
    want = to_image_frame(maps, torch.eye(3).expand(4, 3, 3), 128)[:, 0].numpy()
    assert np.abs(got - want).max() < 1e-6


@in_node
@pytest.mark.parametrize("size, n, kind", [(7, 40, "float32"), (16, 20, "float64"), (128, 1, "float32")])
def test_boxes_regions_and_scores_are_the_packages(size, n, kind):
    heats, cuts = some_maps(size, n, size).astype(kind), [0.0, 0.2, 1 / 3, 0.5, 0.613, 1.0]
    truths = some_boxes(2, size)
    how = dict(call="all", size=size, rules=RULES, cuts=cuts, boxes=truths.tolist(), kind=kind)
    answers = node([how | dict(heat=h.ravel().tolist()) for h in heats])
    assert [a["otsu"] for a in answers] == otsu(heats).tolist()
    for i, rule in enumerate(RULES):
        for j, cut in enumerate(cuts):
            found = detect(heats, rule, cut)
            cells = np.array([a["cells"][i][j] for a in answers], bool).reshape(heats.shape)
            assert np.array_equal(cells, found.regions)
            for m, answer in enumerate(answers):
                boxes, want = answer["boxes"][i][j], found.boxes[found.owner == m].tolist()
                assert boxes[:1] == want[:1] and sorted(boxes) == sorted(want)
            check_scores(heats, found, truths, [a["scores"][i][j] for a in answers])


def check_scores(heats, found, truths, answers):
    wide, names = heats.astype(np.float64), {"hit": "T(IoU)=0.3"}
    for t, box in enumerate(truths):
        want = score(wide, found, np.tile(box, (len(heats), 1)))
        for name in ("IoU", "IoBB", "hit", "pointing", "energy"):
            got = np.array([a[t][name] for a in answers], np.float64)
            assert np.abs(got - want[names.get(name, name)]).max() < 1e-6, name


@in_node
def test_a_piece_in_a_hole_has_no_box_and_its_peak_makes_the_ring_the_first():
    heat = np.zeros((9, 9), np.float32)
    heat[1:7, 1:7], heat[2:6, 2:6], heat[3:5, 3:5], heat[8, 0] = 0.6, 0, 1, 0.9
    case = dict(call="all", heat=heat.ravel().tolist(), size=9, rules=["contours"], cuts=[0.5], boxes=[])
    ring, corner = [1 / 9, 1 / 9, 7 / 9, 7 / 9], [0, 8 / 9, 1 / 9, 1]
    assert node([case])[0]["boxes"][0][0] == [ring, corner]
    assert np.allclose(detect(heat[None], "contours", 0.5).boxes, [ring, corner])


@in_node
def test_curves_and_the_best_threshold_are_the_packages():
    heats, box = smooth(np.random.default_rng(5), 32, 2), some_boxes(1, 5)
    cuts = np.arange(101) / 100
    cases = [dict(call="curve", heat=h.ravel().tolist(), size=32, rules=["largest"], boxes=box.tolist()) for h in heats]
    want = np.stack([overlaps(detect(heats, "largest", t), np.tile(box, (2, 1))) for t in cuts], 1)
    assert np.abs(np.array(node(cases)) - want).max() < 1e-6
    ties = [[0, 1, 1, 1, 0], [1, 1], [0.5], [0, 0, 2, 0, 2, 2]]
    best = [int(at[len(at) // 2]) for at in (np.flatnonzero(np.array(v) >= max(v) - 1e-12) for v in ties)]
    assert node([dict(call="best", heat=v) for v in ties]) == best == [2, 1, 0, 4]


@in_node
def test_from_bytes_to_the_score_it_is_the_packages_number():
    "Bytes as the data hold them, enlarged on either side, at thresholds that no cell meets exactly."
    draw = np.random.default_rng(3)
    small = np.round(smooth(draw, 32, 8) * 255).astype(np.uint8)
    big = to_image_frame(torch.from_numpy(small[:, None] / np.float32(255)), torch.eye(3).expand(8, 3, 3), 128)[:, 0]
    packed = [base64.b64encode(m.tobytes()).decode() for m in small]
    mine = node([dict(call="upsample", bytes=text, size=128) for text in packed])
    cuts, truths = [0.3003, 0.5003, 0.7003], some_boxes(1, 9)
    how = dict(call="all", size=128, rules=["largest", "contours", "union"], cuts=cuts, boxes=truths.tolist())
    answers = node([how | dict(heat=heat) for heat in mine])
    for i, rule in enumerate(how["rules"]):
        for j, cut in enumerate(cuts):
            found = detect(big.numpy(), rule, cut)
            check_scores(big.numpy(), found, truths, [a["scores"][i][j] for a in answers])


# ---- pages and data ----


def toy():
    "Three radiographs, two methods, two findings; the second method has no map of the third radiograph."
    heats = np.round(smooth(np.random.default_rng(1), 32, 12) * 255).astype(np.uint8)
    text = iter(base64.b64encode(h.tobytes()).decode() for h in heats)
    boxes = [dict(finding=k, box=[0.2, 0.3, 0.6, 0.8]) for k in (2, 5)]
    jpeg = base64.b64encode(cv2.imencode(".jpg", np.full((32, 32), 90, np.uint8))[1].tobytes()).decode()
    images = [
        dict(name=f"{i}.png", jpeg=jpeg, labels=[FINDINGS[2]], boxes=boxes,
             maps={m: {k: next(text) for k in ("2", "5")} for m in ("a", "b")[: 2 - (i == 2)]})
        for i in range(3)
    ]  # fmt: skip
    cuts = dict(a=[0.45] * 14, b=[None] * 14)
    methods = [dict(name=m, title=f"Method {m}", rule="largest", thresholds=cuts[m]) for m in "ab"]
    return dict(findings=list(FINDINGS), methods=methods, images=images)


@in_browser
def test_the_page_shows_the_packages_numbers(tmp_path):
    data, page = toy(), tmp_path / "page.html"
    check_explorer(data)
    block = re.search(r"```\{=html\}\n(.*?)```", (ROOT / "explore.qmd").read_text(), re.S)[1]
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "explorer.js").write_text(as_script(data))
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    page.write_text(f"<!doctype html><meta charset=utf-8><body class=quarto-light style='width:900px'>{block}")
    quiet = "quic background-networking component-update sync gpu".split()
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{f}" for f in quiet)]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400", "--virtual-time-budget=4000"]
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    panels = done.stdout.split("<section")[1:]
    assert len(panels) == 2, done.stderr[-2000:]
    assert len(re.findall(r'name="cxr-strip"', done.stdout)) == 3
    heats = [base64.b64decode(data["images"][0]["maps"][m]["2"]) for m in "ab"]
    small = np.stack([np.frombuffer(h, np.uint8).reshape(32, 32) for h in heats]) / np.float32(255)
    big = to_image_frame(torch.from_numpy(small[:, None]), torch.eye(3).expand(2, 3, 3), 128)[:, 0].numpy()
    cuts = np.array([0.45, otsu(big)[1]])
    want = score(big, detect(big, "largest", cuts), np.tile([0.2, 0.3, 0.6, 0.8], (2, 1)))
    for i, panel in enumerate(panels):
        shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", panel))
        assert shown["IoU"] == f"{want['IoU'][i]:.2f}" and shown["IoBB"] == f"{want['IoBB'][i]:.2f}"
        assert shown["energy"] == f"{100 * want['energy'][i]:.0f} %"
        assert shown["pointing"] == ("hit" if want["pointing"][i] else "miss")
        assert f"<output>{cuts[i]:.2f}</output>" in panel and "best mean" in panel
        assert f"mean of {3 - i} boxes of {FINDINGS[2]}" in panel


def test_what_the_pages_load_is_there_or_made():
    made = {"pages/explorer.js", "pages/_gallery.md"}
    for name in ("explore.qmd", "gallery.qmd"):
        text = (ROOT / name).read_text()
        asked = re.findall(r'(?:src|href)="([^"]+\.(?:js|css))"', text) + re.findall(r"include (\S+)", text)
        assert asked and not [f for f in asked if f not in made and not (ROOT / f).is_file()]
        assert "http" not in text


def test_nothing_is_loaded_from_elsewhere():
    for f in (ROOT / "assets").iterdir():
        asked = set(re.findall(r"https?://[^\s\"')]+", f.read_text()))
        assert asked <= {"http://www.w3.org/2000/svg"}, f.name  # the name of a language, not a place


def test_the_gallery_asks_for_labels_that_the_notebooks_have():
    for page, wanted in CHOSEN.items():
        text = (ROOT / "nbs" / f"{page}.ipynb").read_text()
        labels = re.findall(r"#\|\s*label:\s*(fig-[\w-]+)", text)
        assert len(labels) >= wanted if isinstance(wanted, int) else set(wanted) <= set(labels), page


def test_the_published_heat_maps_fit_the_page():
    file = ROOT / "published" / "explorer.json"
    if not file.is_file():
        pytest.skip("published/explorer.json is not there yet")
    assert file.stat().st_size < 1_500_000
    check_explorer(read_json(file))
