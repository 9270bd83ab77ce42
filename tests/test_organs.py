"Masks of lungs and heart: which data may teach them, how they stand beside the images of a study, and how they are judged."

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from cxr_book import organs, segmentation
from cxr_book.core import CxrError, Run, read_json
from cxr_book.data import read
from cxr_book.images import build_cache
from cxr_book.loader import Augment, Loader, warp
from cxr_book.organs import ORGANS, judge, mask_data, segmentation_scores, trained_segmenter, with_organs
from cxr_book.phantom import PhantomSettings, draw_dataset
from cxr_book.realism import reported_file
from cxr_book.segmentation import SegmentationSettings, Segmenter, dice_loss, fit_segmenter, mask_loader, segment
from cxr_book.splits import Split
from cxr_book.study import StudySettings, open_study
from cxr_book.weighting import WeightingSettings

torch.set_num_threads(1)
SETTINGS = SegmentationSettings.from_preset("smoke", width=4, epochs=1, batch_size=8)
HOW = dict(image_size=64, batch_size=8, valid=0.3, n_boot=20)


def at_half(settings=SETTINGS, seed=0):
    "A segmenter that has learnt nothing and calls about half of the pixels of an image organs."
    torch.manual_seed(seed)
    segmenter = Segmenter(settings).eval()
    size = settings.image_size
    with torch.no_grad():
        ramp = torch.linspace(0, 1, size).expand(1, 1, size, size)
        z = segmenter((ramp + ramp.mT) / 2)
        segmenter.net.out.bias -= z.flatten(2).median(2).values[0]
    return segmenter


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("organs")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CXR_BOOK_HOME", str(folder))
        yield read(draw_dataset(PhantomSettings(n_images=40, size=64, seed=2), folder / "set", workers=1))


@pytest.fixture
def study(drawn, tmp_path):
    return open_study(StudySettings(**HOW, data_root=str(drawn.root)), "test", tmp_path / "run")


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory):
    "A run folder with a trained segmenter."
    folder = tmp_path_factory.mktemp("run")
    fit_segmenter(drawn, SETTINGS, folder / "segmenter")
    return folder


def plain_folder(root, names, size=32, seed=0):
    "Noise with square organs, as a folder that has no lists."
    rng = np.random.default_rng(seed)
    for kind in ("images", *(f"masks/{o}" for o in ORGANS)):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for name in names:
        cv2.imwrite(str(root / "images" / f"{name}.png"), rng.integers(0, 256, (size, size), np.uint8))
        for i, organ in enumerate(ORGANS):
            mask = np.zeros((size, size), np.uint8)
            mask[4:20, 10 * i + 1 : 10 * i + 8] = 255
            cv2.imwrite(str(root / "masks" / organ / f"{name}.png"), mask)
    return root


# ---------------------------------------------------------------- masks to learn from


def test_without_a_folder_the_drawn_set_of_the_preset_teaches(drawn, monkeypatch):
    asked = []
    monkeypatch.setattr(organs, "draw_dataset", lambda settings: asked.append(settings) or drawn.root)
    assert mask_data(preset="smoke").fingerprint == drawn.fingerprint
    assert asked == [PhantomSettings.from_preset("smoke")]


@pytest.mark.parametrize("organ", ORGANS)
def test_a_missing_mask_is_named_with_its_image(tmp_path, organ):
    plain_folder(tmp_path, ["a", "b", "c"])
    assert set(ORGANS) <= set(mask_data(tmp_path).masks)
    (tmp_path / "masks" / organ / "b.png").unlink()
    with pytest.raises(CxrError, match=f"no mask of {organ} for b.png"):
        mask_data(tmp_path)
    for left in (tmp_path / "masks" / organ).iterdir():
        left.unlink()
    (tmp_path / "masks" / organ).rmdir()
    with pytest.raises(CxrError, match=f"no mask of {organ} for a.png"):
        mask_data(tmp_path)


def test_an_image_that_is_not_there_needs_no_mask(tmp_path):
    plain_folder(tmp_path, ["a", "b", "c"])
    (tmp_path / "images.csv").write_text("image\n" + "".join(f"{n}.png\n" for n in "abcd"))
    data = mask_data(tmp_path)
    assert data.present.tolist() == [True, True, True, False] and data.masks["heart"][3] is None


def test_names_tell_the_patients_of_a_folder_without_lists(tmp_path):
    plain_folder(tmp_path, ["7-day-0", "7-day-12", "8-day-3"])
    assert mask_data(tmp_path).table["patient"].tolist() == ["7", "7", "8"]


def test_jsrt_with_its_outlines_trains_by_patient(drawn, tmp_path, monkeypatch):
    names = [f"JPC{k}N{i:03d}" for k in "LN" for i in range(1, 13)]
    for row, name in enumerate(names):
        (tmp_path / "All247images").mkdir(exist_ok=True)
        image = cv2.imread(str(drawn.paths[row]), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(tmp_path / "All247images" / f"{name}.png"), image)
        fold = tmp_path / "scratch" / f"fold{2 - int(name[-3:]) % 2}" / "masks"
        for organ in ORGANS:
            (fold / organ.replace("_", " ")).mkdir(parents=True, exist_ok=True)
            mask = cv2.imread(str(drawn.masks[organ][row]), cv2.IMREAD_GRAYSCALE)
            Image.fromarray(mask).save(fold / organ.replace("_", " ") / f"{name}.gif")
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path / "home"))
    data, seen, loader_of = mask_data(tmp_path), [], segmentation.mask_loader
    assert data.name == "JSRT" and len(data) == 24 and not data.labels[12:].any()

    def spy(radiographs, rows, *args, **how):
        seen.append(rows)
        return loader_of(radiographs, rows, *args, **how)

    monkeypatch.setattr(segmentation, "mask_loader", spy)
    segmenter, history = fit_segmenter(data, SETTINGS.but(valid=0.2, batch_size=4), tmp_path / "run")
    train, valid = seen
    who = data.table["patient"].to_numpy()
    assert len(train) and len(valid) and len(history) == 1 and 0 < history[0]["valid_dice"] < 1
    assert not set(who[train]) & set(who[valid]) and set(train) | set(valid) == set(data.lists["fold1"].tolist())
    scores = segmentation_scores(segmenter, data, data.lists["fold2"], n_boot=10)
    assert (scores.n[:6] == 12).all() and scores.value[:6].between(0, 1).all()
    right = segment(segmenter, loader_of(data, None, SETTINGS))[1]
    truth = segment(segmenter, loader_of(drawn, np.arange(24), SETTINGS))[1]
    assert np.array_equal(right, truth)  # masks and images kept together


# ---------------------------------------------------------------- beside the images


def bits_of(segmenter, study):
    "What the segmenter says of each cached image by itself, (n, M, S, S) bool, at the segmenter's size."
    side, out = segmenter.settings.image_size, []
    for image in study.cache.images:
        x = torch.from_numpy(np.array(image)).float()[None, None] / 255
        factor = image.shape[0] // side
        with torch.no_grad():
            out.append(segmenter(torch.nn.functional.avg_pool2d(x, factor))[0] > 0)
    return torch.stack(out).numpy()


@pytest.mark.parametrize("side", [64, 32])
def test_masks_are_the_segmenters_and_grow_without_grey(study, side):
    segmenter = at_half(SETTINGS.but(image_size=side))
    found = with_organs(study, segmenter)
    planes = np.load(study.run.folder / "organs.npy")
    assert planes.dtype == np.uint8 and planes.shape == study.cache.images.shape == (40, 64, 64)
    truth = bits_of(segmenter, study).repeat(64 // side, 2).repeat(64 // side, 3)
    got = (planes[:, None] >> np.arange(3)[:, None, None]) & 1
    agree = (got == truth).mean()
    assert agree > 0.9999 and 0.2 < truth.mean() < 0.8 and planes.max() < 8  # a last bit of a sum aside
    assert found.cache.structures == SETTINGS.structures and np.array_equal(found.cache.masks, planes)
    batch = next(found.loader("valid").epoch(0))
    assert torch.equal(batch.masks, torch.from_numpy(got[found.cache.position(batch.rows)]).float())


def test_the_study_itself_stays_without_masks(study):
    before = dict(vars(study.cache))
    study.cache.tensors["cpu"] = "of the images alone"
    found = with_organs(study, at_half())
    assert study.cache.masks is None and study.cache.structures == () and found.cache is not study.cache
    assert {k: v for k, v in vars(study.cache).items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}
    assert found.cache.tensors == {}  # what lies on a device has no masks
    study.cache.tensors.clear()
    assert next(study.loader("test").epoch(0)).masks is None
    assert found.cache.images is study.cache.images and found.run is study.run and found.split is study.split


def test_what_is_written_is_not_segmented_again(study, monkeypatch):
    segmenter = at_half()
    first = with_organs(study, segmenter)
    file = study.run.folder / "organs.npy"
    written = file.stat().st_mtime_ns, file.read_bytes()

    def never(*_):
        raise AssertionError("segmented again")

    monkeypatch.setattr(organs, "segment", never)
    again = with_organs(study, segmenter)
    assert np.array_equal(again.cache.masks, first.cache.masks)
    again.cache.masks[:] = 0  # in memory only
    assert (file.stat().st_mtime_ns, file.read_bytes()) == written


def test_interrupted_it_leaves_no_file_and_pieces_make_the_whole(study, monkeypatch):
    segmenter, file = at_half(), study.run.folder / "organs.npy"

    def pieces(parts, desc):
        rows = np.concatenate(list(parts))
        for i in range(0, len(rows), 7):
            if stop and i >= 14:
                raise KeyboardInterrupt
            yield rows[i : i + 7]

    stop = True
    with monkeypatch.context() as m:
        m.setattr(organs, "progress", pieces)
        with pytest.raises(KeyboardInterrupt):
            with_organs(study, segmenter)
        assert not [p for p in os.listdir(study.run.folder) if "organs" in p]
        stop = False
        with_organs(study, segmenter)
    in_pieces = np.load(file)
    file.unlink()
    assert np.array_equal(with_organs(study, segmenter).cache.masks, in_pieces)


@pytest.mark.parametrize("augment", [dict(flip=1.0), dict(shift=0.2), dict(flip=0.5, shift=0.1, rotate=20.0), dict(centre_crop=0.875)])
def test_masks_move_with_the_image(study, augment):
    asked = dataclasses.replace(study, settings=study.settings.but(augment=augment))
    found = with_organs(asked, at_half())
    loader = found.loader("train", augmented=True)
    for batch in loader.epoch(1):
        at = found.cache.position(batch.rows)
        planes = torch.from_numpy(np.array(found.cache.masks[at]))
        whole = torch.stack([(planes >> i & 1).float() for i in range(3)], 1)
        images = torch.from_numpy(np.array(found.cache.images[at])).float()[:, None] / 255
        together = warp(torch.cat([images, whole], 1), batch.affine, loader.size)
        assert torch.allclose(batch.masks, together[:, 1:], atol=1e-5) and torch.allclose(batch.x, together[:, :1], atol=1e-5)
        if augment == dict(flip=1.0):
            assert torch.allclose(batch.masks, whole.flip(3), atol=1e-6)
        if augment == dict(centre_crop=0.875):
            assert torch.equal(batch.masks, whole[..., 4:-4, 4:-4])


def test_images_that_the_cache_skipped_get_no_mask(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path / "home"))
    names = [f"p{i}" for i in range(9)]
    root = plain_folder(tmp_path / "set", names, 64)
    broken = root / "images" / "p4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "images" / "p1.png").unlink()
    (root / "images.csv").write_text("image\n" + "".join(f"{n}.png\n" for n in names))
    data = read(root)
    cache = build_cache(data, 64, skip_broken=True)
    assert cache.rows.tolist() == [0, 2, 3, -1, 5, 6, 7, 8]
    settings, kept = StudySettings(**HOW), cache.kept(np.arange(9))
    split = Split(kept[:3], kept[3:5], kept[5:], data.table["patient"].to_numpy())
    whole = organs.Study(settings, data, split, cache, Run(tmp_path / "run", settings), organs.make_fabric("cpu", "32-true"))
    segmenter = at_half()
    found = with_organs(whole, segmenter)
    truth = bits_of(segmenter, whole)
    for part in ("train", "valid", "test"):
        batch = next(found.loader(part).epoch(0))
        assert torch.equal(batch.masks, torch.from_numpy(truth[cache.position(batch.rows)]).float())
    assert not np.load(tmp_path / "run" / "organs.npy")[3].any()


# ---------------------------------------------------------------- examination


def own_ratio(left, right, heart):
    "Width of the heart over that of the lungs, each the largest piece that hangs together, pixel by pixel."
    widths = []
    for parts in ((heart,), (left, right)):
        columns = []
        for part in parts:
            labels, n = ndimage.label(part, np.ones((3, 3)))
            if not n:
                return None
            sizes = [int((labels == k).sum()) for k in range(1, n + 1)]
            columns += [x for _, x in zip(*np.nonzero(labels == 1 + sizes.index(max(sizes))))]
        widths.append(max(columns) - min(columns) + 1)
    return widths[0] / widths[1]


@pytest.mark.parametrize("names", [None, ("left_lung", "right_lung", "cardiomediastinum"), ("right_lung", "left_lung", "heart")])
def test_scores_are_counted_pixel_by_pixel(drawn, monkeypatch, names):
    rows = np.array([3, 0, 17, 25, 8])
    truth = segment(at_half(), mask_loader(drawn, rows, SETTINGS))[1]
    found = np.roll(truth, 3, -1)
    found[:, :2] &= np.random.default_rng(0).random(found[:, :2].shape) < 0.9
    found[0, 2] |= np.roll(found[0, 2], 4, -1)  # too wide
    found[3, 2] &= np.roll(found[3, 2], 4, -1)  # too narrow
    found[1, 2] = False  # a heart that was not found: no ratio of this image
    monkeypatch.setattr(organs, "segment", lambda method, loader, fabric: (found, segment(method, loader, fabric)[1]))
    scores = segmentation_scores(at_half(), drawn, rows, names, n_boot=20)
    asked = names or ORGANS
    judged = np.stack([[cv2.imread(str(drawn.masks[n][r]), cv2.IMREAD_GRAYSCALE) >= 128 for n in asked] for r in rows])
    for i, organ in enumerate(ORGANS):
        both, either, total = ([] for _ in range(3))
        for a, b in zip(found[:, i].reshape(5, -1).tolist(), judged[:, i].reshape(5, -1).tolist()):
            both.append(sum(p and q for p, q in zip(a, b)))
            either.append(sum(p or q for p, q in zip(a, b)))
            total.append(sum(a) + sum(b))
        for metric, values in (("Dice", [2 * b / t for b, t in zip(both, total)]), ("IoU", [b / e for b, e in zip(both, either)])):
            assert scores.value[organ, metric] == pytest.approx(sum(values) / 5) and scores.n[organ, metric] == 5
            if max(values):  # the lungs of each other have nothing in common
                assert scores.low[organ, metric] < scores.value[organ, metric] < scores.high[organ, metric]
    ratios = [(own_ratio(*a), own_ratio(*b)) for a, b in zip(found, judged)]
    errors = [abs(a - b) for a, b in ratios if a is not None and b is not None]
    line = scores.loc[("cardiothoracic ratio", "error")]
    assert line.value == pytest.approx(sum(errors) / 4) and line.n == len(errors) == 4
    assert min(a - b for a, b in ratios if a) < 0 < max(a - b for a, b in ratios if a)
    assert list(scores.columns) == ["value", "low", "high", "n"] and len(scores) == 7


def test_intervals_are_over_patients(drawn):
    who = drawn.table["patient"].to_numpy()
    names, counts = np.unique(who, return_counts=True)
    scores = segmentation_scores(at_half(), drawn, np.flatnonzero(who == names[counts.argmax()]), n_boot=20)
    assert counts.max() > 2 and np.allclose(scores.low[:6], scores.high[:6]) and (scores.value[:6] > 0).any()


def test_a_perfect_segmenter_has_perfect_scores(drawn, monkeypatch):
    monkeypatch.setattr(organs, "segment", lambda *args: (segment(*args)[1],) * 2)
    scores = segmentation_scores(at_half(), drawn, np.arange(6), n_boot=10)
    assert (scores.loc[list(ORGANS), ["value", "low", "high"]] == 1).all(axis=None)
    assert scores.value["cardiothoracic ratio", "error"] == 0


def test_the_dice_loss_is_the_papers_equation_2():
    rng = np.random.default_rng(0)
    z, masks = rng.normal(0, 3, (4, 3, 6, 5)), (rng.random((4, 3, 6, 5)) < 0.4).astype(float)
    masks[2, 1], z[2, 1] = 0, -50  # nothing there, nothing found
    losses = []
    for logits, mask in zip(z.reshape(12, 30).tolist(), masks.reshape(12, 30).tolist()):
        probs = [1 / (1 + np.exp(-v)) for v in logits]
        both, smooth = sum(p * m for p, m in zip(probs, mask)), 1e-9
        losses.append(1 - (2 * both + smooth) / (sum(probs) + sum(mask) + smooth))
    loss = dice_loss(torch.from_numpy(z), torch.from_numpy(masks), smooth=1e-9)
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-6) and losses[7] < 1e-6


# ---------------------------------------------------------------- a trained one, and its judgement


def test_a_trained_segmenter_comes_back_as_it_was(run, drawn, tmp_path):
    found = trained_segmenter(run)
    again, _ = fit_segmenter(drawn, SETTINGS, run / "segmenter")  # finished: loaded
    assert found.settings == SETTINGS and not any(m.training for m in found.modules())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in found.state_dict().items())
    assert trained_segmenter(str(run)).settings == SETTINGS
    with pytest.raises(CxrError, match="config.json"):
        trained_segmenter(tmp_path)
    Run(tmp_path / "segmenter", SETTINGS, drawn.fingerprint)  # begun and not finished
    with pytest.raises(CxrError, match="weights.safetensors"):
        trained_segmenter(tmp_path)


def test_a_judgement_is_what_its_file_says(run, drawn, tmp_path, monkeypatch):
    out = tmp_path / "new" / "judged.json"
    told = judge(run, drawn.root, out, n_boot=10)
    assert told == read_json(out) and json.loads(out.read_text())["images"] == 40
    assert SegmentationSettings(**told["settings"]) == SETTINGS and told["stamp"]["data"] == drawn.fingerprint
    scores = segmentation_scores(trained_segmenter(run), drawn, n_boot=10).reset_index()
    lines = {(line["structure"], line["metric"]): line for line in told["scores"]}
    for line in scores.to_dict("records"):
        same = lines.pop((line["structure"], line["metric"]))
        assert all(np.isclose(same[k], line[k]) if np.isfinite(line[k]) else same[k] is None for k in ("value", "low", "high", "n"))
    assert not lines
    before = out.read_bytes()

    def torn(source, target):
        raise OSError("the power went")

    monkeypatch.setattr(os, "replace", torn)
    with pytest.raises(OSError, match="power"):
        judge(run, drawn.root, out, n_boot=5)
    assert out.read_bytes() == before and os.listdir(out.parent) == ["judged.json"]


def call(monkeypatch, *words):
    "What the command line ends with."
    monkeypatch.setattr(sys, "argv", ["organs", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        organs.app()
    return stop.value.code


def test_the_command_line_prints_the_scores_or_says_what_is_wrong(run, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(organs, "segment", lambda *args: (segment(*args)[1],) * 2)
    assert call(monkeypatch, run, drawn.root, "--out", tmp_path / "judged.json") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum("1.0 1.0 1.0" in " ".join(line) for line in lines) == 6 and (tmp_path / "judged.json").exists()
    assert ["cardiothoracic", "ratio", "error", "0.0", "0.0", "0.0", "40.0"] in lines
    assert "config.json" in call(monkeypatch, tmp_path, drawn.root, "--out", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_the_command_line_can_say_that_no_ratio_was_found(run, drawn, tmp_path, monkeypatch, capsys):
    def nothing(*args):
        truth = segment(*args)[1]
        return np.zeros_like(truth), truth

    monkeypatch.setattr(organs, "segment", nothing)
    assert call(monkeypatch, run, drawn.root, "--out", tmp_path / "judged.json") == 0


def test_a_judgement_refuses_images_without_masks(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path / "home"))
    root = plain_folder(tmp_path / "set", ["a", "b", "c"], 64)
    (root / "masks" / "heart" / "b.png").unlink()
    with pytest.raises(CxrError, match="heart for b.png"):
        judge(run, root, tmp_path / "judged.json", n_boot=5)


def test_the_packages_figures_are_of_the_book():
    file = reported_file("organs_real.json")
    if not Path(file).exists():
        pytest.skip("not measured yet")
    told, asked = read_json(file), WeightingSettings.from_preset("quick").segmentation
    assert told["settings"] == asked.model_dump(mode="json")
    assert told["images"] > 0 and {line["structure"] for line in told["scores"]} == {*ORGANS, "cardiothoracic ratio"}


# ---------------------------------------------------------------- copies


def test_a_loader_of_masks_can_be_shared(study):
    "Processes of one training see their own part of the same masks."
    found = with_organs(study, at_half())
    whole = Loader(found.cache, found.radiographs, found.split.train, 8, Augment(flip=0.5), masks=True, shuffle=True, drop_last=True)
    parts = [copy.copy(whole).shard(rank, 2) for rank in range(2)]
    for batch, *shares in zip(whole.epoch(0), *(p.epoch(0) for p in parts)):
        for rank, share in enumerate(shares):
            assert torch.allclose(share.masks, batch.masks[rank::2], atol=1e-6) and share.masks.shape[1] == 3
