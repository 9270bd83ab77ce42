"What the notebook of `predict` cannot say: known maps on odd images, kills, hostile names, memory, many files."

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import torch
from pydicom.pixels import set_pixel_data
from torch import nn
from typer.testing import CliRunner

from cxr_book.baselines import BaselineSettings, methods
from cxr_book.catalogue import open_trained
from cxr_book.command import app
from cxr_book.core import FINDINGS, CxrError
from cxr_book.evaluation import heat_of
from cxr_book.export import export_onnx, open_method
from cxr_book.layers import Output, save_weights
from cxr_book.loader import Augment
from cxr_book.localization import PAPER_RULES, BoxRule, detect
from cxr_book.predict import COLUMNS, Predictor, answers, predict_files, show_summary
from cxr_book.reading import read_pictures
from cxr_book.report import DISCLAIMER, pixel_boxes
from cxr_book.study import StudySettings, fit, open_study, predict_parts, score_all


class Bright(nn.Module):
    "A method that finds what is bright: the maps are the image on a coarser grid, the logits rise with the finding."

    def __init__(self, cell=4, sign=1.0):
        super().__init__()
        self.cell, self.sign = cell, nn.Parameter(torch.tensor(sign))

    def forward(self, x):
        grid = nn.functional.avg_pool2d(x, self.cell).expand(-1, len(FINDINGS), -1, -1)
        logits = self.sign * torch.linspace(-2, 2, len(FINDINGS)).expand(len(x), -1)
        return Output(logits, 6 * grid - 3)


@dataclass(frozen=True, eq=False)
class Stand:
    "What `predict` needs of a trained method."

    folder: Path
    rule: BoxRule = BoxRule(rule="largest", threshold=0.5)
    thresholds: np.ndarray = field(default_factory=lambda: np.full(14, 0.5))
    operating: np.ndarray = field(default_factory=lambda: np.full(14, 0.5))
    settings: StudySettings = StudySettings(image_size=64, precision="32-true")
    sign: float = 1.0
    name: str = "bright"
    chapter: str = "00_stand"
    title: str = "Stand-in: bright"

    @property
    def run(self):
        return self.folder

    @property
    def input_augment(self):
        return self.settings.still

    @property
    def weights(self):
        return self.folder / "weights.safetensors"

    def load(self):
        method = Bright(sign=self.sign)
        if not self.weights.exists():
            save_weights(method, self.weights)
        return method.eval()


@pytest.fixture
def stand(tmp_path):
    (tmp_path / "run").mkdir()
    Stand(tmp_path / "run").load()
    return Stand(tmp_path / "run")


def lines(out):
    return [json.loads(text) for text in (out / "predictions.jsonl").read_text().splitlines()]


def rows(out, name="predictions.csv"):
    with open(out / name, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def scene(path, shape=(700, 1000), box=(600, 350, 750, 490), dark=10):
    "A dark picture with one bright box."
    image = np.full(shape, dark, np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 250
    cv2.imwrite(str(path), image)
    return path


# --- the way in and the way back


@pytest.fixture(scope="module", params=["whole", "centre"])
def study(request, tmp_path_factory):
    "A baseline that was trained for an epoch, on whole images or on their centre as in paper 004."
    home = tmp_path_factory.getbasetemp() / "home"
    crop = dict(centre_crop=0.875, out_size=56) if request.param == "centre" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_BOOK_HOME", str(home))
        settings = BaselineSettings.from_preset("smoke", augment=Augment(**crop), precision="32-true", n_boot=0)
        study = open_study(settings, "10_baselines", home / request.param)
        method, _ = fit(study, "dcnn", methods(settings)["dcnn"])
        parts = predict_parts(study, method)
        score_all(study, {"dcnn": parts}, BoxRule(rule="largest", threshold=0.7))
    return study, parts[0]


def test_the_same_as_the_study(study):
    study, test = study
    trained = open_trained(study.run.folder)
    predictor = Predictor(trained, "cpu", batch_size=5)
    pictures = [next(read_pictures(study.radiographs.paths[r])) for r in test.map_rows]
    own = predictor.predict(np.stack([predictor.square(p.pixels) for p in pictures]))
    at = [test.rows.tolist().index(r) for r in test.map_rows]
    assert np.allclose(own.logits, test.logits[at], atol=1e-5)
    assert np.allclose(own.maps, test.maps, atol=1e-5) and np.array_equal(own.affine, test.affine)
    cuts = trained.thresholds
    for i in range(len(test.map_rows)):
        for k, a in enumerate(answers(predictor, own, i, "all")):
            heat = heat_of(test, np.array([i]), np.array([k]), trained.rule)
            assert np.allclose(a.heat, heat[0], atol=1e-4)
            found = detect(heat, trained.rule.rule, cuts[k])
            assert np.allclose(a.boxes, found.boxes, atol=1.1 / heat.shape[1])
            assert a.threshold == pytest.approx(trained.operating[k], nan_ok=True) or a.threshold is None


def test_a_run_gives_its_thresholds(study, tmp_path):
    study, test = study
    trained = open_trained(study.run.folder)
    predict_files([study.radiographs.paths[r] for r in test.rows[:4]], trained, tmp_path, html=False)
    told = {a["finding"]: a for a in lines(tmp_path)[0]["findings"]}
    for k, f in enumerate(FINDINGS):
        t = trained.operating[k]
        assert told[f]["threshold"] == (None if np.isnan(t) else pytest.approx(t))
        assert told[f]["present"] == (None if np.isnan(t) else told[f]["probability"] >= t)


def test_an_exported_method_predicts_the_same(study, tmp_path):
    study, test = study
    file = export_onnx(open_trained(study.run.folder), tmp_path / "dcnn.onnx")
    images = [str(study.radiographs.paths[r]) for r in test.rows[:4]]
    for run, out in ((study.run.folder, "a"), (file, "b")):
        done = CliRunner().invoke(app, ["predict", *images, "--run", str(run), "--out", str(tmp_path / out), "--no-html"])
        assert done.exit_code == 0, done.output
    for one, two in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        for a, b in zip(one["findings"], two["findings"], strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-4) and a["threshold"] == b["threshold"]
            assert a.get("boxes") == b.get("boxes")
    with pytest.raises(CxrError, match="holds 'dcnn' and no other"):
        open_method(file, "chexnet")


@pytest.mark.parametrize("rule", [*PAPER_RULES, "union"])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_boxes_in_the_pixels_of_an_odd_image(tmp_path, rule, crop):
    (tmp_path / "run").mkdir()
    box = (600, 350, 750, 490)
    image = scene(tmp_path / "a.png", box=box)
    kind = PAPER_RULES.get(rule, BoxRule(rule="union", threshold=0.5))
    cut = np.nan if kind.threshold == "otsu" else kind.threshold
    settings = StudySettings(image_size=128, precision="32-true", augment=Augment(centre_crop=crop))
    stand = Stand(tmp_path / "run", rule=kind, thresholds=np.full(14, cut), settings=settings)
    predict_files([image], stand, tmp_path / "out", html=False)
    (line,) = lines(tmp_path / "out")
    assert (line["width"], line["height"]) == (1000, 700)
    there = [a for a in line["findings"] if a["present"]]
    assert [a["finding"] for a in there] == list(FINDINGS[7:])
    assert all(a["boxes"] is None for a in line["findings"][:7])
    for a in there:
        (found,) = a["boxes"]
        assert all(isinstance(v, int) for v in found["pixels"])
        assert np.abs(np.subtract(found["pixels"], box)).max() <= 1.1 * 4 / 128 * 1000  # a cell of the map
        assert np.allclose(pixel_boxes([found["fractions"]], (700, 1000))[0], found["pixels"], atol=1)
        assert np.allclose(found["fractions"], np.array(box) / (1000, 700, 1000, 700), atol=0.04)
    row = rows(tmp_path / "out")[-1]
    assert [int(row[c]) for c in ("x0", "y0", "x1", "y1")] == there[-1]["boxes"][0]["pixels"]


def test_boxes_stay_within_the_image(stand, tmp_path):
    image = scene(tmp_path / "a.png", (333, 77), (0, 0, 77, 333), dark=250)  # flat: no heat at all
    corner = scene(tmp_path / "b.png", (77, 333), (300, 60, 333, 77))
    predict_files([image, corner], stand, tmp_path / "out", findings="all", png=True)
    flat, other = lines(tmp_path / "out")
    assert all(a["boxes"] == [] for a in flat["findings"])
    for a in other["findings"]:
        x0, y0, x1, y1 = a["boxes"][0]["pixels"]
        assert 0 <= x0 < x1 == 333 and 0 <= y0 < y1 == 77
    assert len(list((tmp_path / "out" / "overlays").glob("b-*.png"))) == 14
    assert cv2.imread(str(next((tmp_path / "out" / "overlays").glob("b-*.png")))).shape == (77, 333, 3)


def test_dicom_as_png(stand, tmp_path):
    image = cv2.imread(str(scene(tmp_path / "a.png")), cv2.IMREAD_GRAYSCALE)
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.Modality, ds.ViewPosition = "1.2.840.10008.5.1.4.1.1.1.1", "DX", "LL"
    ds.WindowCenter, ds.WindowWidth = 1000 + 127.5 + 0.5, 256
    set_pixel_data(ds, np.stack([1255 - image.astype(np.uint16), 1255 - image.astype(np.uint16)]), "MONOCHROME1", 12)
    ds.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    predict_files([tmp_path / "a.png", tmp_path / "b.dcm"], stand, tmp_path / "out")
    png, one, two = lines(tmp_path / "out")
    assert png["findings"] == one["findings"] == two["findings"] and (one["frame"], two["frame"]) == (1, 2)
    assert one["written"] != two["written"] and "LL" in one["notes"][0]
    assert "Frame: 2 of 2" in (tmp_path / "out" / two["written"][0]).read_text()


def test_thresholds_that_are_not_known(stand, tmp_path):
    image = scene(tmp_path / "a.png")
    stand = Stand(stand.folder, operating=np.full(14, np.nan), thresholds=np.full(14, np.nan))
    predict_files([image], stand, tmp_path / "out")
    (line,) = lines(tmp_path / "out")
    assert {a["present"] for a in line["findings"]} == {None} and {a["threshold"] for a in line["findings"]} == {None}
    assert [a["finding"] for a in line["findings"] if a["boxes"] is not None] == [FINDINGS[-1]]
    assert {r["present"] for r in rows(tmp_path / "out")} == {""}


# --- files


TAGS = "html head meta title style body main h1 h2 p ul li div figure img figcaption table thead tbody tr th td i b a"


def test_hostile_names(stand, tmp_path):
    names = ["<img src=x onerror=alert(1)>.png", "=1+cmd.png", 'a"b&c.png', "line\nbreak.png", "...png"]
    names.append("é" * 60 + ".png")
    for folder in ("in", "in/https:"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(scene(tmp_path / "s.png", (60, 60), (9, 9, 20, 20)).read_bytes())
    os.rename(os.fsencode(tmp_path / "s.png"), os.fsencode(tmp_path) + b"/in/\xff\xfe.png")
    here = Path.cwd()
    try:
        os.chdir(tmp_path / "in")
        summary = predict_files([Path("=1+cmd.png"), tmp_path / "in"], stand, "out", png=True)
    finally:
        os.chdir(here)
    out = tmp_path / "in" / "out"
    assert (summary.pictures, summary.failed) == (13, 0)
    reports = sorted((out / "reports").iterdir())
    assert len(reports) == 13 and all(re.fullmatch(r"[\w-]+\.html", p.name, re.A) for p in reports)
    top = {"predict.json", "predictions.jsonl", "predictions.csv", "index.html", "reports", "overlays", ".lock"}
    assert {p.name for p in out.iterdir()} == top
    for page in [*reports, out / "index.html"]:
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(\w+)", text)
        assert "<img src=x" not in text and set(tags) <= set(TAGS.split())
        inside = "".join(re.findall(r"<[^>]*>", text.split("</style>")[1]))
        assert not re.search(r'(?:src|href)="(?!data:image/png;base64,|reports/)|javascript:|onerror="', inside)
        assert text.count(DISCLAIMER) == 1 and "prefers-color-scheme" in text and "default-src 'none'" in text
        assert inside.count("<img ") == inside.count(" alt=")
    assert all(r["file"][0] not in "=+-@" for r in rows(out)) and len(rows(out)) == 13 * 14


def test_unreadable_files(stand, tmp_path, capsys):
    for i in range(5):
        scene(tmp_path / f"{i}.png", (50, 60), (9, 9, 20, 20))
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "readme").write_text("text")  # and the weights: two other files
    files = [tmp_path, tmp_path / "missing.png"]
    summary = predict_files(files, stand, tmp_path / "out", batch_size=2)
    assert (summary.pictures, summary.failed, summary.others, summary.code) == (4, 2, 2, 1)
    assert {Path(r["file"]).name for r in rows(tmp_path / "out", "errors.csv")} == {"2.png", "missing.png"}
    said = capsys.readouterr().err
    assert "2.png" in said and "missing.png" in said and "Traceback" not in said
    scene(tmp_path / "2.png", (50, 60), (9, 9, 20, 20))
    summary = predict_files([tmp_path], stand, tmp_path / "out")
    assert (summary.pictures, summary.kept, summary.code) == (1, 4, 0)
    assert not (tmp_path / "out" / "errors.csv").exists()
    assert len({r["file"] for r in rows(tmp_path / "out")}) == 5
    show_summary(summary)
    assert "4 files done before" in capsys.readouterr().out
    with pytest.raises(CxrError, match="no PNG, JPEG or DICOM"):
        (tmp_path / "none").mkdir()
        predict_files([tmp_path / "none"], stand, tmp_path / "out")


def test_a_network_that_fails_for_one_picture(stand, tmp_path, monkeypatch):
    for i, top in enumerate((100, 255, 130)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 40), top, np.uint8))
    forward = Bright.forward

    def fails(self, x):
        out = forward(self, x)
        return out._replace(logits=torch.where(x.amax((1, 2, 3))[:, None] == 1, torch.nan, out.logits))

    monkeypatch.setattr(Bright, "forward", fails)
    summary = predict_files([tmp_path / f"{i}.png" for i in range(3)], stand, tmp_path / "out")
    assert (summary.pictures, summary.failed) == (2, 1)
    assert "not finite" in rows(tmp_path / "out", "errors.csv")[0]["error"]


def test_another_run_or_other_options_are_refused(stand, tmp_path):
    image, out = scene(tmp_path / "a.png", (50, 60), (9, 9, 20, 20)), tmp_path / "out"
    predict_files([image], stand, out)
    with pytest.raises(CxrError, match="findings"):
        predict_files([image], stand, out, findings=["Mass"])
    (tmp_path / "other").mkdir()
    Stand(tmp_path / "other", sign=-1.0).load()
    with pytest.raises(CxrError, match="weights"):
        predict_files([image], Stand(tmp_path / "other", sign=-1.0), out)
    assert predict_files([image], stand, out).pictures == 0
    assert predict_files([image], stand, out, again=True).pictures == 1
    (out / lines(out)[0]["written"][0]).unlink()  # a report that somebody removed is made again
    assert predict_files([image], stand, out).pictures == 1 and len(lines(out)) == 1
    (out / "predict.json").unlink()
    with pytest.raises(CxrError, match="unknown origin"):
        predict_files([image], stand, out)
    with pytest.raises(CxrError, match="did you mean 'Mass'"):
        predict_files([image], stand, tmp_path / "new", findings=["Mas"])
    assert not (tmp_path / "new").exists()


def test_weights_that_are_a_pickle(study, tmp_path):
    study, test = study
    folder = study.run.folder / "dcnn"
    whole = (folder / "weights.safetensors").read_bytes()
    try:
        torch.save({"a": torch.zeros(1)}, folder / "weights.safetensors")
        with pytest.raises(CxrError, match="pickle"):
            predict_files([study.radiographs.paths[test.rows[0]]], open_trained(study.run.folder), tmp_path / "out")
    finally:
        (folder / "weights.safetensors").write_bytes(whole)


def many(folder, n):
    "Some pictures, one of them of six frames."
    files = [scene(folder / f"{i:02}.png", (80, 90), (i, 9, i + 20, 30)) for i in range(n - 1)]
    ds = pydicom.Dataset()
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    set_pixel_data(ds, np.random.default_rng(0).integers(0, 255, (6, 30, 30)).astype(np.uint8), "MONOCHROME2", 8)
    ds.save_as(folder / "many.dcm", enforce_file_format=True)
    return [files[0], folder / "many.dcm", *files[1:]]


def results(out):
    "Journal and table, in an order of their own."
    told = sorted((line["file"], line["frame"], str(line["findings"])) for line in lines(out))
    return told, sorted(map(str, rows(out)))


def test_stopped_at_any_moment(stand, tmp_path):
    files, out, rng = many(tmp_path, 9), tmp_path / "out", np.random.default_rng(3)
    predict_files(files, stand, out)
    whole, journal = results(out), (out / "predictions.jsonl").read_bytes()
    assert len(whole[0]) == 14 and len(whole[1]) == 14 * 14
    for cut in [0, *rng.integers(1, len(journal), 9).tolist()]:  # what a kill leaves: lines, and a piece of one
        (out / "predictions.jsonl").write_bytes(journal[:cut])
        (out / "predictions.csv").unlink(missing_ok=True)
        (out / "index.html").unlink()
        complete = journal[:cut].count(b"\n")
        summary = predict_files(files, stand, out)
        redone = complete - 1 if 1 < complete < 7 else 0  # frames of the file that was not complete
        assert summary.pictures == 14 - complete + redone and results(out) == whole, cut
        assert (out / "index.html").exists()


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_predict import Stand, predict_files
class Slow(Stand):
    def load(self):
        method = super().load()
        method.register_forward_hook(lambda *_: time.sleep(0.3))
        return method
folder = Path(sys.argv[2])
predict_files(sorted(folder.glob("*.*")), Slow(folder / "run"), folder / "out", workers=2, batch_size=2)
"""


def test_killed(stand, tmp_path):
    many(tmp_path, 40)
    out = tmp_path / "out"
    running = subprocess.Popen([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)])
    try:
        while not (out / "predictions.jsonl").exists() or (out / "predictions.jsonl").read_bytes().count(b"\n") < 8:
            assert running.poll() is None
            time.sleep(0.02)
        with pytest.raises(CxrError, match="another prediction"):
            predict_files([tmp_path], stand, out)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    before = (out / "predictions.jsonl").read_bytes().count(b"\n")
    assert 8 <= before < 45 and not (out / "predictions.csv").exists()
    summary = predict_files(sorted(tmp_path.glob("*.*")), stand, out)
    assert summary.pictures == 45 - before and summary.kept == before  # the six frames come last
    predict_files(sorted(tmp_path.glob("*.*")), stand, tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")


def peak_mb(work):
    "The largest resident memory of this process while it works."
    Path("/proc/self/clear_refs").write_text("5")
    work()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell")
def test_memory_does_not_grow_with_the_images(stand, tmp_path):
    image = scene(tmp_path / "s.png", (400, 400), (9, 90, 50, 190)).read_bytes()
    files = [tmp_path / f"{i:03}.png" for i in range(300)]
    for file in files:
        file.write_bytes(image)
    peaks = [
        peak_mb(lambda: predict_files(some, stand, tmp_path / f"{len(some)}", findings="Mass", workers=2))
        for some in (files[:20], files[:60], files[:300])
    ]
    assert peaks[2] < peaks[1] + 12, peaks  # 300 pictures are 48 MB


def test_columns(stand, tmp_path):
    predict_files([scene(tmp_path / "a.png")], stand, tmp_path / "out", html=False)
    (first, *_), n = rows(tmp_path / "out"), len(rows(tmp_path / "out"))
    assert tuple(first) == COLUMNS and n == 14 and not (tmp_path / "out" / "index.html").exists()
