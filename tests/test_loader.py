"""Images, cache and loader: what the notebooks cannot say (kills, damage, real files, markers in real pixels)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_book import images
from cxr_book.core import CxrError
from cxr_book.images import ImageCache, build_cache, read_grey, to_square
from cxr_book.loader import Augment, Loader, move_boxes, move_points, sample_affines, warp

REAL = Path(__file__).parents[1] / ".." / "shared" / "chestxray14"
STRONG = Augment(crop_scale=(0.8, 1.0), crop_aspect=(0.75, 1.733), flip=0.5, rotate=25, zoom=0.1, shift=0.05)


def data_set(root, paths, masks=None, labels=None):
    "The part of `Radiographs` that cache and loader use."
    labels = np.zeros((len(paths), 14), np.uint8) if labels is None else labels
    return SimpleNamespace(name="test", root=Path(root), paths=list(paths), masks=masks or {}, labels=labels)


def noise_files(root, n, side=64, suffix="png", seed=0):
    "Small files of blurred noise."
    rng = np.random.default_rng(seed)
    paths = [Path(root) / f"{i:04}.{suffix}" for i in range(n)]
    for p in paths:
        image = cv2.GaussianBlur(rng.integers(0, 256, (side, side), dtype=np.uint8), (0, 0), 1)
        cv2.imwrite(str(p), image)
    return paths


def contents(folder):
    "All bytes of a folder but those of the lock."
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != ".lock"}


# Files


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99, "last byte"])
def test_a_truncated_file_is_named(tmp_path, suffix, part):
    path = noise_files(tmp_path, 1, 200, suffix)[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 1 if part == "last byte" else int(len(data) * part)])
    with pytest.raises(CxrError, match=rf"0000\.{suffix}.*again"):
        read_grey(path)


def test_a_progressive_jpeg_with_a_thumbnail_is_not_fooled_by_its_end(tmp_path):
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (200, 200), dtype=np.uint8), (0, 0), 1)
    whole = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    small = cv2.imencode(".jpg", image[:32, :32])[1].tobytes()
    exif = b"\xff\xe1" + (len(small) + 8).to_bytes(2, "big") + b"Exif\0\0" + small
    path = tmp_path / "thumb.jpg"
    path.write_bytes(whole[:2] + exif + whole[2:])
    assert np.abs(read_grey(path).astype(int) - image).mean() < 4
    path.write_bytes((whole[:2] + exif + whole[2:])[:-100])
    with pytest.raises(CxrError, match="cut off"):
        read_grey(path)
    path.write_bytes(whole + b"\0" * 50)  # padding after the end is common and harmless
    assert read_grey(path).shape == (200, 200)


def test_damaged_and_foreign_files(tmp_path):
    path = noise_files(tmp_path, 1, 200)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(CxrError, match="damaged"):
        read_grey(path)
    for name, content, says in [("a.png", b"", "empty"), ("b.jpg", b"<html>404</html>", "no image"),
                                ("c.IMG", b"\0" * 1000, "8,388,608"), ("d.IMG", b"\xff" * 2**23, "12 bits"),
                                ("e.tif", b"II*\0", "no image"), ("g.png", data[:20], "no image")]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CxrError, match=says) as e:
            read_grey(tmp_path / name)
        assert name in str(e.value)
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(CxrError, match="cannot be read"):
            read_grey(path)


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    from PIL import Image

    for suffix in ("png", "jpg", "tif"):
        path = tmp_path / f"big.{suffix}"
        if suffix == "tif":
            Image.new("1", (11_000, 11_000)).save(path, compression="group4")
        else:
            small = cv2.imencode(f".{suffix}", np.zeros((8, 8), np.uint8))[1].tobytes()
            at = 16 if suffix == "png" else small.index(b"\xff\xc0") + 5
            size = (30_000).to_bytes(4 if suffix == "png" else 2, "big") * 2
            path.write_bytes(small[:at] + size + small[at + len(size) :])
        start = time.perf_counter()
        with pytest.raises(CxrError, match="over the limit of 100 megapixels"):
            read_grey(path)
        assert time.perf_counter() - start < 2
    path = noise_files(tmp_path, 1, 200)[0]
    with pytest.raises(CxrError, match="limit of 0.01 megapixels"):
        read_grey(path, max_megapixels=0.01)


@pytest.mark.parametrize(
    "kind", ["rgba", "grey+alpha", "16 bit", "16 bit rgba", "palette", "1 bit", "gif", "tif", "tif 16", "bmp"]
)
def test_every_kind_of_pixel_becomes_the_same_grey(tmp_path, kind):
    from PIL import Image

    picture = np.zeros((40, 60), np.uint8)
    picture[5:10, 7:31], picture[20:36, 50:58] = 255, 0 if kind == "1 bit" else 90
    path = tmp_path / f"x.{kind[:3] if kind[:3] in ('gif', 'tif', 'bmp') else 'png'}"
    alpha, wide = np.full_like(picture, 128), picture.astype(np.uint16) * 16 + 300
    if kind == "16 bit rgba":
        cv2.imwrite(str(path), np.dstack([wide] * 3 + [wide]))
    elif kind == "16 bit":
        cv2.imwrite(str(path), wide)
    elif kind == "tif 16":
        Image.fromarray(wide).save(path)
    else:
        image = Image.fromarray(picture)
        image = {"rgba": lambda: Image.fromarray(np.dstack([picture] * 3 + [alpha])),
                 "palette": lambda: image.convert("P"),
                 "grey+alpha": lambda: Image.fromarray(np.dstack([picture, alpha]), "LA"),
                 "1 bit": lambda: image.convert("1")}.get(kind, lambda: image)()  # fmt: skip
        image.save(path)
    assert np.abs(read_grey(path).astype(int) - picture).max() <= 1


# Cache


def test_missing_files_are_counted_and_left_out(tmp_path, capsys):
    paths = noise_files(tmp_path, 6)
    cache = build_cache(data_set(tmp_path, [paths[0], None, *paths[1:], None, None]), 32, folder=tmp_path / "c")
    assert "6 of 9 images present; 3 missing" in capsys.readouterr().out
    assert list(cache.rows) == [0, 2, 3, 4, 5, 6] and list(cache.position([6, 0])) == [5, 0]
    with pytest.raises(CxrError, match="2 of 3 rows are not in the cache.*row 1"):
        cache.position([0, 1, 8])
    with pytest.raises(CxrError, match="1 of 1 rows"):
        cache.position([-1])
    with pytest.raises(CxrError, match="none of the 2 images"):
        build_cache(data_set(tmp_path, [None, None]), 32)
    with pytest.raises(CxrError, match="has no such masks; did you mean 'heart'"):
        build_cache(data_set(tmp_path, paths, {"heart": paths}), 32, masks=["hart"])
    with pytest.raises(CxrError, match="rows 2 to 9"):
        build_cache(data_set(tmp_path, paths), 32, rows=[2, 9])
    with pytest.raises(CxrError, match="no finished cache"):
        ImageCache(tmp_path / "nowhere")


def test_default_folder_tells_caches_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path / "home"))
    data = data_set(tmp_path, noise_files(tmp_path, 5))
    caches = [build_cache(data, *a) for a in [(32,), (16,), (32, [0, 1]), (32, None)]]
    assert len({c.folder for c in caches}) == 3 and caches[0].folder == caches[3].folder
    assert caches[0].folder.parent == tmp_path / "home" / "cache" and caches[0].folder.name.startswith(
        "test-32-"
    )
    with pytest.raises(CxrError, match="holds the cache of other data"):
        build_cache(data, 16, folder=caches[0].folder)


def test_broken_files_are_listed_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    paths = noise_files(tmp_path, 70)
    whole = {i: paths[i].read_bytes() for i in range(20, 33)}
    data, folder = data_set(tmp_path, paths), tmp_path / "c"
    expected = contents(build_cache(data, 32, folder=tmp_path / "undisturbed").folder)
    for i in whole:
        paths[i].write_bytes(whole[i][:40])
    with pytest.raises(CxrError, match="13 of 70 images cannot be read; all others are cached") as e:
        build_cache(data, 32, folder=folder)
    assert str(e.value).count("0.png") + sum(f"{i:04}.png" in str(e.value) for i in range(21, 30)) == 10
    assert (np.fromfile(folder / "images.u8", np.uint8).reshape(-1, 32, 32)[33:].any((1, 2))).all()
    cache = build_cache(data, 32, folder=folder, skip_broken=True)
    assert "13 unreadable images left out" in capsys.readouterr().out
    assert len(cache.kept(np.arange(70))) == 57 and (cache.rows == -1).sum() == 13
    with pytest.raises(CxrError, match="unreadable"):
        cache.position([25])
    for i in whole:
        paths[i].write_bytes(whole[i])
    reads = []
    monkeypatch.setattr(images, "read_grey", lambda p, *a: reads.append(p) or read_grey(p, *a))
    assert contents(build_cache(data, 32, folder=folder).folder)["images.u8"] == expected["images.u8"]
    assert len(reads) == 64  # two chunks of three


def test_a_replaced_source_and_a_damaged_cache_are_noticed(tmp_path):
    paths = noise_files(tmp_path, 40)
    data, folder = data_set(tmp_path, paths), tmp_path / "c"
    before = build_cache(data, 32, folder=folder).images.copy()
    cv2.imwrite(str(paths[3]), np.full((64, 64), 77, np.uint8))
    after = build_cache(data, 32, folder=folder)
    assert (after.images[3] == 77).all() and (after.images[4:] == before[4:]).all()
    good = contents(folder)
    for damage in ("truncate", "flip", "marker", "rows"):
        if damage == "truncate":
            os.truncate(folder / "images.u8", 5000)
        elif damage == "flip":
            images._write_at(folder / "images.u8", 39 * 1024, np.zeros(7, np.uint8))
        else:
            (folder / {"marker": "cache.json", "rows": "plan.json"}[damage]).unlink()
        build_cache(data, 32, folder=folder)
        assert contents(folder) == good, damage


def test_full_disk(tmp_path, monkeypatch):
    data, folder = data_set(tmp_path, noise_files(tmp_path, 100)), tmp_path / "c"
    expected = contents(build_cache(data, 32, folder=tmp_path / "undisturbed").folder)
    with monkeypatch.context() as m:
        m.setattr(images.shutil, "disk_usage", lambda p: SimpleNamespace(free=50_000))
        with pytest.raises(CxrError, match="needs 0.0 GB more.*CXR_BOOK_HOME"):
            build_cache(data, 32, folder=folder)
    write = images._write_at

    def full(path, offset, pixels):
        if offset >= 64 * 1024:
            raise OSError(28, "No space left on device")
        return write(path, offset, pixels)

    with monkeypatch.context() as m:
        m.setattr(images, "_write_at", full)
        with pytest.raises(CxrError, match="disk is full.*goes on from here"):
            build_cache(data, 32, folder=folder, workers=1)
    reads = []
    monkeypatch.setattr(images, "read_grey", lambda p, *a: reads.append(p) or read_grey(p, *a))
    assert contents(build_cache(data, 32, folder=folder).folder) == expected
    assert len(reads) == 36  # the two chunks that were written are not made again


KILLED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from cxr_book import images
paths = sorted(Path(sys.argv[1]).glob("*.png"))
masks = {"heart": [p if i % 3 else None for i, p in enumerate(paths)]}
data = SimpleNamespace(name="test", root=Path(sys.argv[1]), paths=paths, masks=masks)
print("ready", flush=True)
while True:
    images.build_cache(data, 32, masks=["heart"], folder=sys.argv[2], workers=2)
    (Path(sys.argv[2]) / "cache.json").write_text("{}")  # make it start again, whenever it was quick
    (Path(sys.argv[2]) / "images.u8").write_bytes(b"")
"""


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "files").mkdir()
    paths = noise_files(tmp_path / "files", 400, 128)
    data = data_set(tmp_path / "files", paths, {"heart": [p if i % 3 else None for i, p in enumerate(paths)]})
    expected = contents(build_cache(data, 32, masks=["heart"], folder=tmp_path / "undisturbed").folder)
    dice = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "files"), str(tmp_path / "killed")],
                                   stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert contents(build_cache(data, 32, masks=["heart"], folder=tmp_path / "killed").folder) == expected


def test_two_processes_at_once_build_one_cache(tmp_path):
    (tmp_path / "files").mkdir()
    noise_files(tmp_path / "files", 200, 128)
    code = KILLED.replace("while True:", "for _ in [0]:").split("    (Path")[0]
    command = [sys.executable, "-c", code, str(tmp_path / "files"), str(tmp_path / "c")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert sum("200 in" in text for text in said) == 1


def test_seventeen_masks_keep_their_bits(tmp_path):
    paths, rng = noise_files(tmp_path, 3, 32), np.random.default_rng(0)
    masks, truth = {}, rng.random((17, 3, 32, 32)) < 0.5
    for m in range(17):
        masks[f"m{m}"] = [tmp_path / f"m{m}_{i}.png" for i in range(3)]
        for i in range(3):
            cv2.imwrite(str(masks[f"m{m}"][i]), truth[m, i].astype(np.uint8) * 255)
    masks["m4"][1] = None
    truth[4, 1] = False
    for names in (list(masks), list(masks)[:9], list(masks)[:3]):
        cache = build_cache(
            data_set(tmp_path, paths, masks), 32, masks=names, folder=tmp_path / f"c{len(names)}"
        )
        batch = next(Loader(cache, np.zeros((3, 14)), [0, 1, 2], 3, masks=True).epoch(0))
        assert torch.equal(batch.masks, torch.from_numpy(truth[: len(names)]).transpose(0, 1).float())
    few = next(Loader(cache, np.zeros((3, 14)), [2], 1, masks=["m2", "m0"]).epoch(0))
    assert torch.equal(few.masks[0], torch.from_numpy(truth[[2, 0], 2]).float())
    with pytest.raises(CxrError, match="masks = 'm9': not in the cache"):
        Loader(cache, np.zeros((3, 14)), [2], 1, masks=["m9"])


# Geometry


def centroids(image, k):
    "Centres (k, 2), as fractions, of the k largest bright spots, the largest first."
    n, _, stats, _ = cv2.connectedComponentsWithStats((image > 0.15).astype(np.uint8))
    order = 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA])[:k]
    found = []
    for x, y, w, h, _ in stats[order]:
        part = slice(max(y - 2, 0), y + h + 2), slice(max(x - 2, 0), x + w + 2)
        light = image[part].astype(float)
        ys, xs = np.mgrid[part]
        found.append([((xs + 0.5) * light).sum() / light.sum(), ((ys + 0.5) * light).sum() / light.sum()])
    return np.array(found) / image.shape[0]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    "One image with a square at each corner of a box, all of distinct sizes, as a PNG of 1024 and a JPEG of 512."
    root = tmp_path_factory.mktemp("marked")
    box, image = np.array([300, 380, 610, 560]), np.zeros((1024, 1024), np.uint8)
    for (x, y), half in zip(box[[[0, 1], [2, 1], [2, 3], [0, 3]]], (40, 32, 24, 16)):
        image[y - half : y + half, x - half : x + half] = 230
    mask = np.zeros_like(image)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    cv2.imwrite(str(root / "a.png"), image)
    cv2.imwrite(
        str(root / "b.jpg"),
        cv2.resize(image, (512, 512), interpolation=cv2.INTER_AREA),
        [cv2.IMWRITE_JPEG_QUALITY, 95],
    )
    cv2.imwrite(str(root / "mask.png"), mask)
    data = data_set(root, [root / "a.png", root / "b.jpg"], {"heart": [root / "mask.png"] * 2})
    return build_cache(data, 256, masks=["heart"], folder=root / "cache"), data, box / 1024


@pytest.mark.parametrize("row", [0, 1], ids=["png 1024", "jpg 512"])
@pytest.mark.parametrize("size", [256, 224])
def test_a_box_goes_to_the_augmented_frame_and_back_within_half_a_pixel(marked, row, size):
    cache, data, box = marked
    loader = Loader(cache, data, [row] * 64, 64, augment=STRONG, size=size, seed=11, masks=True)
    batch = next(loader.epoch(0))
    quads, _ = move_boxes(np.repeat(box[None], 64, 0), batch.affine)
    inside = ((quads > 0.12) & (quads < 0.88)).all((1, 2))  # all four markers wholly in view
    mirrored = np.linalg.det(batch.affine.double().numpy()[:, :2, :2]) < 0
    turned = np.abs(batch.affine[:, 0, 1].numpy()) > 0.1
    assert (
        inside.sum() > 20
        and (mirrored & inside).any()
        and (~mirrored & inside).any()
        and (turned & inside).sum() > 5
    )
    for i in np.flatnonzero(inside):
        found = centroids(batch.x[i, 0].numpy(), 4)
        assert np.abs(found - quads[i]).max() * size < 0.5  # where the image shows it
        back = move_points(found, batch.affine[i])
        assert np.abs(back - box[[[0, 1], [2, 1], [2, 3], [0, 3]]]).max() * size < 0.5  # and where it was
        middle = centroids(batch.masks[i, 0].numpy(), 1)[0]
        assert np.abs(move_points(middle, batch.affine[i]) - (box[:2] + box[2:]) / 2).max() * size < 0.5


def test_without_augmentation_the_markers_are_where_the_box_says(marked):
    cache, data, box = marked
    crop = Augment(centre_crop=224 / 256)
    for augment, size in ((None, 256), (crop, 224), (None, 128), (None, 300)):
        batch = next(
            Loader(cache, data, [0, 1], 2, augment=augment, size=size if augment is None else None).epoch(0)
        )
        quads, around = move_boxes(np.repeat(box[None], 2, 0), batch.affine)
        assert batch.x.shape[-1] == size
        for i in (0, 1):
            assert np.abs(centroids(batch.x[i, 0].numpy(), 4) - quads[i]).max() * size < 0.5
            assert np.allclose(move_boxes(around[i : i + 1], batch.affine[i], back=True)[1], box)


affines = st.builds(
    lambda seed, rotate, flip: sample_affines(
        3, STRONG.but(rotate=rotate, flip=flip), torch.Generator().manual_seed(seed)),
    st.integers(0, 10**6), st.floats(0, 180), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(affines, st.integers(0, 10**6))
def test_there_and_back_again(A, seed):
    points = np.random.default_rng(seed).random((3, 5, 2))
    inverse = torch.linalg.inv(A.double())
    assert np.allclose(move_points(move_points(points, A), inverse), points, atol=1e-6)
    boxes = np.sort(points[:, :2].reshape(3, 2, 2), 1).reshape(3, 4)
    quads, around = move_boxes(boxes, A)
    assert np.allclose(move_points(quads, A), boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]], atol=1e-6)
    assert (around[:, None, :2] <= quads + 1e-12).all() and (quads <= around[:, None, 2:] + 1e-12).all()

    t = (torch.arange(96) + 0.5) / 96
    smooth = torch.sin(9 * t)[:, None] * torch.cos(7 * t + 1) + 0.3 * torch.sin(5 * t)  # (96, 96), no symmetry
    x = smooth.expand(3, 1, 96, 96).contiguous()
    there = warp(x, A, 96)
    seen = warp(warp(torch.ones_like(x), A, 96), inverse.float(), 96) > 0.999
    assert (warp(there, inverse.float(), 96) - x)[seen].abs().max() < 0.03


@settings(max_examples=25, deadline=None)
@given(affines, st.integers(0, 10**6))
def test_a_composed_affine_is_its_parts_in_turn(A, seed):
    B = sample_affines(3, STRONG, torch.Generator().manual_seed(seed))
    points = np.random.default_rng(seed).random((3, 7, 2))
    assert np.allclose(
        move_points(points, A.double() @ B.double()), move_points(move_points(points, B), A), atol=1e-12
    )


def test_gradients_flow_through_image_and_matrix():
    x = torch.rand(2, 1, 8, 8, dtype=torch.float32, requires_grad=True)
    A = sample_affines(2, STRONG, torch.Generator().manual_seed(0)).requires_grad_()
    warp(x, A, 8).square().sum().backward()
    assert x.grad.abs().sum() > 0 and A.grad[:, :2].abs().min() > 0


# Loader


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    data = data_set(root, noise_files(root, 30), labels=np.eye(14, dtype=np.uint8)[np.arange(30) % 14])
    return build_cache(data, 32, folder=root / "cache"), data


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b) if u is not None)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_give_the_batches_of_one(toys, world):
    cache, data = toys
    knobs = dict(rows=np.arange(30), batch_size=8, augment=STRONG, seed=3, shuffle=True)
    one = list(Loader(cache, data, **knobs).epoch(2))
    many = [list(Loader(cache, data, rank=r, world=world, **knobs).epoch(2)) for r in range(world)]
    assert all(len(m) == len(one) == 4 for m in many)
    for step, whole in enumerate(one):
        for r in range(world):
            assert same(many[r][step][:4], [t[r::world] for t in whole[:4]])


def test_ranks_share_an_evaluation_however_it_divides(toys):
    cache, data = toys
    seen = [torch.cat([b.rows for b in Loader(cache, data, np.arange(29), 7, rank=r, world=3).epoch(0)]) for r in range(3)]
    assert sorted(torch.cat(seen).tolist()) == list(range(29))


def test_start_resumes_exactly_and_epochs_differ(toys):
    cache, data = toys
    loader = Loader(cache, data, np.arange(30), 8, augment=STRONG, seed=3, shuffle=True, drop_last=True)
    epochs = [list(loader.epoch(e)) for e in range(3)]
    assert [len(e) for e in epochs] == [3, 3, 3] and len(loader) == 3
    again = list(
        Loader(cache, data, np.arange(30), 8, augment=STRONG, seed=3, shuffle=True, drop_last=True).epoch(1, 2)
    )
    assert len(again) == 1 and same(again[0], epochs[1][2])
    assert not torch.equal(epochs[0][0].rows, epochs[1][0].rows)
    other = next(Loader(cache, data, np.arange(30), 8, seed=4, shuffle=True).epoch(0))
    assert not torch.equal(other.rows, epochs[0][0].rows)


def test_an_epoch_has_each_row_once_with_its_own_label(toys):
    cache, data = toys
    batches = list(Loader(cache, data, np.arange(29, -1, -1), 7, shuffle=True).epoch(5))
    rows = torch.cat([b.rows for b in batches])
    assert sorted(rows.tolist()) == list(range(30)) and len(batches) == 5
    assert torch.equal(torch.cat([b.y for b in batches]), torch.from_numpy(data.labels)[rows].float())
    assert np.allclose(torch.cat([b.x for b in batches])[:, 0], cache.images[rows] / 255)


def test_a_batch_that_is_kept_is_never_written_over(toys):
    cache, data = toys
    loader = Loader(cache, data, np.arange(30), 5)
    kept = [b.x[1:2, :, 4:9].view(5, 32) for b in loader.epoch(0)]  # views alone must hold their memory
    copies = [k.clone() for k in kept]
    for _ in range(3):
        sum(b.x.mul_(0).sum() for b in loader.epoch(0))
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))
    addresses = {b.x.data_ptr() for _ in range(5) for b in loader.epoch(0)}
    assert len(addresses) < 10  # and memory that nobody looks at is used again


def test_what_the_loader_refuses(toys):
    cache, data = toys
    for knobs, says in [(dict(batch_size=0), "batch_size = 0"), (dict(batch_size=9, world=2, shuffle=True), "multiple of the 2"),
                        (dict(batch_size=29 * 2, world=29, rank=29), "batch_size"),
                        (dict(batch_size=4, world=4, shuffle=True), "drop_last")]:  # fmt: skip
        with pytest.raises(CxrError, match=says):
            Loader(cache, data, np.arange(29), **knobs)
    with pytest.raises(CxrError, match="3 of 31 rows are not in the cache"):
        Loader(cache, data, np.arange(2, 33), 4)
    with pytest.raises(CxrError, match="rotation"):
        Augment(rotation=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("resident", ["auto", False])
def test_cuda_gives_what_the_cpu_gives(toys, resident):
    cache, data = toys
    for augment in (None, STRONG):
        knobs = dict(rows=np.arange(30), batch_size=8, augment=augment, seed=3, shuffle=True)
        gpu = Loader(cache, data, device="cuda", resident=resident, **knobs)
        assert gpu.images.is_cuda == (resident == "auto")
        for a, b in zip(Loader(cache, data, **knobs).epoch(0), gpu.epoch(0)):
            assert torch.allclose(a.x, b.x.cpu(), atol=1e-4) and same(a[1:], [t.cpu() for t in b[1:4]])


# The real images


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/chestxray14 is not here")
def test_real_files_of_both_kinds(tmp_path, capsys):
    from cxr_book.data import read

    data = read(REAL)
    boxed = [r for r in np.unique(data.boxes["row"]) if data.paths[r] is not None]
    rows = np.concatenate([np.flatnonzero(data.present)[:250], boxed, np.flatnonzero(~data.present)[:1000]])
    cache = build_cache(data, 128, rows=rows, folder=tmp_path / "c")
    n = len(np.unique(rows))
    assert f"{n - 1000:,} of {n:,} images present; 1,000 missing" in capsys.readouterr().out
    suffixes = {data.paths[r].suffix for r in cache.rows}
    assert suffixes == {".png", ".jpg"} and cache.images.std((1, 2)).min() > 5
    assert len(boxed) == 31


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/chestxray14 is not here")
def test_real_boxes_land_on_the_same_anatomy_at_1024_and_512(tmp_path):
    from cxr_book.data import read

    data = read(REAL)
    boxes = data.boxes[[data.paths[r] is not None for r in data.boxes["row"]]].iloc[:16]
    halves = {}
    for r in boxes["row"].unique():
        halves[r] = tmp_path / f"{r}.jpg"
        small = cv2.resize(read_grey(data.paths[r]), (512, 512), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(halves[r]), small, [cv2.IMWRITE_JPEG_QUALITY, 95])
    rows, original = np.array(list(halves)), data_set(REAL, data.paths)
    copy = data_set(tmp_path, [halves.get(r) for r in range(len(data.paths))])
    views = []
    for d, folder in ((original, "a"), (copy, "b")):
        cache = build_cache(d, 256, rows=rows, folder=tmp_path / folder)
        views.append(list(Loader(cache, data.labels, boxes["row"], 8, augment=STRONG, seed=1).epoch(0)))
    xyxy, at = boxes[["x0", "y0", "x1", "y1"]].to_numpy(), 0
    for a, b in zip(*views):
        assert torch.equal(a.affine, b.affine)
        around = np.clip(move_boxes(xyxy[at : at + len(a.x)], a.affine)[1], 0, 1)
        at += len(a.x)
        for i, (x0, y0, x1, y1) in enumerate(np.round(around * 256).astype(int)):
            if x1 - x0 > 8 and y1 - y0 > 8:
                crops = [v.x[i, 0, y0:y1, x0:x1].numpy().ravel() for v in (a, b)]
                assert np.corrcoef(crops)[0, 1] > 0.98
                assert np.abs(crops[0] - crops[1]).mean() < 0.02


def test_to_square_keeps_the_edges_where_they_are():
    ramp = np.tile(np.linspace(0, 255, 120).astype(np.uint8), (90, 1))
    for size in (30, 60, 200):
        square = to_square(ramp, size)
        ideal = np.interp((np.arange(size) + 0.5) / size, (np.arange(120) + 0.5) / 120, ramp[0])
        assert square.shape == (size, size) and np.abs(square[size // 2] - ideal).max() <= 1.5
