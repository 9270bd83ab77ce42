"The drawn data set on disk: same bytes however it is drawn, killed, crowded or out of space; the official layout."

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from cxr_book.core import FINDINGS, CxrError, read_json
from cxr_book.course import PhantomSettings, course, plan, real_pairs
from cxr_book.drawing import STRUCTURES, draw_image
from cxr_book.phantom import (
    BOX_HEADER, BOXES, ENTRIES, ENTRY_HEADER, LISTS, TRUTH, TRUTH_HEADER, VERSION, draw_dataset, facts, mask_levels,
)

SMALL = PhantomSettings(n_images=70, size=64, seed=3)
OFFICIAL = Path(__file__).parents[2] / "shared" / "chestxray14"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(folder, settings=SMALL, workers=1):
    "Draw in a process of its own; returns when it begins."
    code = (
        "import sys; from pathlib import Path; from cxr_book.phantom import PhantomSettings, draw_dataset\n"
        "if __name__ == '__main__':\n"
        f"    print('go', flush=True); draw_dataset(PhantomSettings(**{settings.model_dump()!r}), {str(folder)!r}, {workers})"
    )
    cwd = Path(__file__).parents[1]
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=cwd, start_new_session=True)
    assert p.stdout.readline() == b"go\n"
    return p


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_dataset(SMALL, tmp_path_factory.mktemp("drawn") / "set", workers=1)


def test_same_bytes_with_one_and_three_workers(drawn, tmp_path):
    assert contents(draw_dataset(SMALL, tmp_path / "three", workers=3)) == contents(drawn)


def test_killed_ten_times_ends_with_the_same_bytes(drawn, tmp_path):
    rng, folder, killed = random.Random(0), tmp_path / "killed", 0
    (folder / "images").mkdir(parents=True)
    for k in range(10):
        process, begun = start(folder, workers=2 if k in (2, 6) else 1), time.monotonic()
        enough = len(os.listdir(folder / "images")) + rng.randrange(0, 6)
        while process.poll() is None and len(os.listdir(folder / "images")) < enough and time.monotonic() - begun < 20:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        killed += process.poll() is None
        os.kill(process.pid, signal.SIGKILL) if k == 6 else os.killpg(process.pid, signal.SIGKILL)  # 6: orphans workers
        process.wait()
    assert killed == 10 and 0 < len(os.listdir(folder / "images")) < SMALL.n_images
    (folder / "images" / ".00000001_000.png.123.tmp").write_bytes(b"half")  # as a kill between two writes leaves it
    assert contents(draw_dataset(SMALL, folder, workers=1)) == contents(drawn)


def test_killed_while_the_tables_are_written(drawn, tmp_path):
    "Whatever of the last files is there: the next call writes the rest."
    folder = draw_dataset(SMALL, tmp_path / "set", workers=1)
    for missing in ("drawn.json", "test_list.txt", TRUTH, BOXES, ENTRIES):
        (folder / "drawn.json").rename(folder / ".drawing.json")
        (folder / missing).unlink(missing_ok=True)
        assert contents(draw_dataset(SMALL, folder, workers=1)) == contents(drawn)


def test_truncated_and_empty_files_are_drawn_again(drawn, tmp_path):
    folder = draw_dataset(SMALL, tmp_path / "set", workers=1)
    (folder / "drawn.json").rename(folder / ".drawing.json")
    names = sorted(os.listdir(folder / "images"))
    (folder / "images" / names[3]).write_bytes(b"")
    (folder / "masks" / "heart" / names[5]).write_bytes((folder / "masks" / "heart" / names[5]).read_bytes()[:40])
    assert contents(draw_dataset(SMALL, folder, workers=1)) == contents(drawn)


def test_two_processes_at_once_share_one_data_set(drawn, tmp_path):
    both = [start(tmp_path / "set") for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert contents(tmp_path / "set") == contents(drawn)


@pytest.mark.parametrize("where", ["replace", "write"])
def test_full_disk(drawn, tmp_path, monkeypatch, where):
    left, real = [40], os.replace if where == "replace" else Path.write_bytes

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(os if where == "replace" else Path, "replace" if where == "replace" else "write_bytes", full)
        with pytest.raises(CxrError, match="disk is full"):
            draw_dataset(SMALL, tmp_path / "set", workers=1)
    assert not list((tmp_path / "set").rglob(".*.tmp")) and list((tmp_path / "set" / "images").iterdir())
    assert contents(draw_dataset(SMALL, tmp_path / "set", workers=1)) == contents(drawn)


def test_full_disk_at_the_tables(drawn, tmp_path, monkeypatch):
    real = os.replace

    def full(a, b):
        if Path(b).name == BOXES:
            raise OSError(28, "No space left on device")
        return real(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(CxrError, match="disk is full"):
            draw_dataset(SMALL, tmp_path / "set", workers=1)
    assert not (tmp_path / "set" / "drawn.json").exists()
    assert contents(draw_dataset(SMALL, tmp_path / "set", workers=1)) == contents(drawn)


def test_refuses_what_is_not_its_own(drawn, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CxrError, match="thesis.txt"):
        draw_dataset(SMALL, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious" and len(list((tmp_path / "mine").iterdir())) == 1
    with pytest.raises(CxrError, match="seed = 3, asked for seed = 4"):
        draw_dataset(SMALL.but(seed=4), drawn)
    with pytest.raises(CxrError, match="is a file"):
        draw_dataset(SMALL, tmp_path / "mine" / "thesis.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "drawn.json").write_text("{broken")
    with pytest.raises(CxrError, match="drawn.json"):
        draw_dataset(SMALL, tmp_path / "other")
    with pytest.raises(CxrError, match="workers"):
        draw_dataset(SMALL, tmp_path / "new", workers=0)


def test_layout(drawn):
    visits = plan(SMALL)
    entries = list(csv.reader((drawn / ENTRIES).open()))
    assert ",".join(entries[0]) == ENTRY_HEADER and len(entries) == 71 and {len(e) for e in entries} == {11}
    assert [(e[0], e[1], int(e[2]), int(e[3])) for e in entries[1:]] == [
        (v.name, "|".join(v.labels) or "No Finding", v.follow_up, v.patient) for v in visits
    ]
    assert (drawn / BOXES).read_text().splitlines()[0] == BOX_HEADER == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    sides = [(drawn / f).read_text().split() for f in LISTS]
    patients = [{n[:8] for n in names} for names in sides]
    assert sorted(sum(sides, [])) == [v.name for v in visits] and not patients[0] & patients[1] and all(sides)
    assert {p.name for p in drawn.iterdir()} == {ENTRIES, BOXES, TRUTH, *LISTS, "drawn.json", "images", "masks"}
    assert read_json(drawn / "drawn.json")["settings"] == SMALL.model_dump(mode="json")
    for v in visits:
        image = cv2.imread(str(drawn / "images" / v.name), cv2.IMREAD_UNCHANGED)
        assert image.shape == (64, 64) and image.dtype == np.uint8
        have = {m.name for m in (drawn / "masks").iterdir() if (m / v.name).exists()}
        assert have == {*STRUCTURES, *v.findings}


def test_boxes_enclose_masks(drawn):
    rows = list(csv.reader((drawn / BOXES).open()))[1:]
    assert {r[1].replace("Infiltrate", "Infiltration") for r in rows} <= set(FINDINGS) and "Infiltration" not in {r[1] for r in rows}
    assert len(rows) == sum(len(v.findings) for v in plan(SMALL))
    for name, label, *box in rows:
        x, y, w, h = (float(b) / 1024 * 64 for b in box[:4])
        path = drawn / "masks" / label.replace("Infiltrate", "Infiltration") / name
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(mask)) <= {0, 128, 255} and cv2.boundingRect(mask) == (x, y, w, h)


def test_patients_are_the_same_in_larger_sets_and_consistent():
    assert plan(SMALL) == plan(SMALL.but(n_images=500))[:70]
    for p in range(1, 60):
        visits = course(SMALL, p)
        assert len({(v.sex, v.test, v.patient) for v in visits}) == 1
        assert [v.follow_up for v in visits] == list(range(len(visits)))
        assert all(0 <= b.age - a.age <= 1 for a, b in zip(visits, visits[1:]))


def test_findings_do_not_depend_on_each_other():
    for p in range(1, 5):
        everything, one = draw_image(SMALL, p, 0, FINDINGS), draw_image(SMALL, p, 0, ("Mass",))
        assert (everything.masks["Mass"] == one.masks["Mass"]).all() and everything.severities["Mass"] == one.severities["Mass"]


def test_boxes_of_a_class_vary():
    "The mean box of a class is a poor guess of where it is, for most classes."
    poor = 0
    for f in FINDINGS:
        b = np.array([draw_image(SMALL, p, 0, (f,)).boxes[f] for p in range(1, 31)])
        m, area = b.mean(0), (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        w = np.clip(np.minimum(b[:, 2:], m[2:]) - np.maximum(b[:, :2], m[:2]), 0, 1).prod(1)
        poor += (w / (area + (m[2:] - m[:2]).prod() - w)).mean() < 0.3
    assert poor >= 10


def test_truth_beside_the_labels(tmp_path):
    "Label noise changes the csv of images and the box list of the train part; truth.csv, masks and images stay."
    noisy = SMALL.but(false_negatives=0.5, false_positives={"Nodule": 0.3})
    folder, clean = draw_dataset(noisy, tmp_path / "noisy", workers=1), draw_dataset(SMALL, tmp_path / "clean", workers=1)
    rows, true = (list(csv.DictReader((f / TRUTH).open())) for f in (folder, clean))
    told = {(r[0], f) for r in csv.reader((folder / ENTRIES).open()) for f in r[1].split("|")}
    assert [{**r, "Reported": ""} for r in rows] == [{**r, "Reported": ""} for r in true]
    assert {r["Reported"] for r in true} == {"1"} and {r["Reported"] for r in rows} == {"0", "1"}
    assert all(((r["Image Index"], r["Finding"]) in told) == (r["Reported"] == "1") for r in rows)
    boxed = {(r[0], r[1].replace("Infiltrate", "Infiltration")) for r in list(csv.reader((folder / BOXES).open()))[1:]}
    assert boxed == {(r["Image Index"], r["Finding"]) for r in rows if r["Reported"] == "1"}
    test = set((folder / LISTS[1]).read_text().split())
    assert all(r["Reported"] == "1" for r in rows if r["Image Index"] in test)
    for part in ("images", "masks"):
        assert contents(folder / part) == contents(clean / part)
    assert ",".join(rows[0]) == TRUTH_HEADER


def test_facts_are_read_off_masks(drawn):
    rows = list(csv.DictReader((drawn / TRUTH).open()))
    assert len(rows) == sum(len(v.findings) for v in plan(SMALL)) and {r["Side"] for r in rows} == {"left", "right", "both"}
    for v in plan(SMALL)[:20]:
        d = draw_image(SMALL, v.patient, v.follow_up)
        for r in (r for r in rows if r["Image Index"] == v.name):
            fact = facts(mask_levels(d), r["Finding"])
            assert float(r["Visible"]) == fact["visible"] and float(r["Area"]) == d.masks[r["Finding"]].mean()
            assert [float(r[k]) for k in ("x0", "y0", "x1", "y1")] == fact["box"] == d.boxes[r["Finding"]].tolist()


@pytest.mark.parametrize("size", [64, 200, 1024])
def test_every_size(size):
    settings = SMALL.but(size=size)
    d, empty = draw_image(settings, 4, 0, ("Effusion", "Nodule")), draw_image(settings, 4, 0, ())
    assert d.image.shape == (size, size) and d.image.dtype == np.uint8
    changed = d.image != empty.image
    assert changed.any() and not (changed & ~(d.masks["Effusion"] | d.masks["Nodule"])).any()
    assert all(m.any() for m in d.structures.values())


def test_shortcuts_change_neither_patients_nor_findings():
    tied = SMALL.but(shortcut_tube=1.0, shortcut_marker=1.0)
    for v, w in zip(plan(SMALL)[:24], plan(tied)):
        a, b = draw_image(SMALL, v.patient, v.follow_up), draw_image(tied, v.patient, v.follow_up)
        assert v.findings == w.findings and ("chest_tube" in b.marks) == ("Pneumothorax" in w.findings)
        assert all((a.masks[f] == b.masks[f]).all() for f in a.masks)
        assert all((a.structures[s] == b.structures[s]).all() for s in STRUCTURES)


GOLDEN = Path(__file__).parent / f"drawn-v{VERSION}.png"


def test_pixels_are_those_of_this_version():
    """The same seed gives the same pixels here as where the picture was made, within one grey level.

    Raise `phantom.VERSION` when the drawing changes, and make the picture of the new version: python tests/test_phantom.py
    """
    drawn, golden = golden_sheet(), cv2.imread(str(GOLDEN), cv2.IMREAD_UNCHANGED)
    assert golden is not None and np.abs(drawn.astype(int) - golden).max() <= 1


def golden_sheet():
    settings = PhantomSettings(size=128, seed=7)
    return np.hstack([draw_image(settings, p, 0, FINDINGS[3 * k : 3 * k + 3]).image for k, p in enumerate(range(1, 6))])


def test_wrong_calls_are_explained():
    with pytest.raises(CxrError, match="visits 0 to"):
        draw_image(SMALL, 1, 99)
    with pytest.raises(CxrError, match="Pnuemonia"):
        draw_image(SMALL, 1, 0, ("Pnuemonia",))


def test_command_line(drawn, tmp_path):
    run = [sys.executable, "-m", "cxr_book.phantom", str(tmp_path / "set")]
    options = ["--n-images", "70", "--size", "64", "--seed", "3", "--workers", "2"]
    out = subprocess.run(run + options, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert out.returncode == 0 and out.stdout.splitlines()[-1] == str(tmp_path / "set"), out.stderr
    assert contents(tmp_path / "set") == contents(drawn)
    out = subprocess.run(run + ["--size", "7"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert out.returncode == 1 and "size = 7" in out.stderr and "Traceback" not in out.stderr


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official metadata is not here")
def test_headers_and_counts_are_the_official_ones():
    rows = list(csv.reader((OFFICIAL / ENTRIES).open()))
    names, pairs, n = real_pairs()
    assert ",".join(rows[0]) == ENTRY_HEADER and len(rows) - 1 == n
    has = np.array([[f in r[1].split("|") for f in FINDINGS] + [r[6] == "AP"] for r in rows[1:]], int)
    assert names == (*FINDINGS, "AP") and (has.T @ has == pairs).all()
    assert (OFFICIAL / BOXES).open().readline().rstrip("\n") == BOX_HEADER


if __name__ == "__main__":
    cv2.imwrite(str(GOLDEN), golden_sheet())
