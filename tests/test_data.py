"""What the notebook of `data` cannot say: the real metadata, every bad input, both releases, all layouts."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cxr_book.core import BOXED, FINDINGS, CxrError
from cxr_book.data import data_card, read, read_chestxray14, read_folder, read_jsrt, scan, table_1

SHARED = Path(__file__).parents[1] / ".." / "shared"
REAL, CHEST = SHARED / "chestxray14", SHARED / "chest_masks"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/chestxray14 is not here")
needs_chest = pytest.mark.skipif(not CHEST.is_dir(), reason="../shared/chest_masks is not here")

# Table 1 of paper 004: finding, train, test, box
TABLE_1 = """
Atelectasis 8280 3279 180 | Cardiomegaly 1707 1069 146 | Effusion 8659 4658 153 | Infiltration 13782 6112 123
Mass 4034 1748 85 | Nodule 4708 1623 79 | Pneumonia 876 555 120 | Pneumothorax 2637 2665 98
Consolidation 2852 1815 0 | Edema 1378 925 0 | Emphysema 1423 1093 0 | Fibrosis 1251 435 0
Pleural Thickening 2242 1143 0 | Hernia 141 86 0 | Multi-label Totals 53970 27206 984 | Finding 36024 15735 984
No Finding 50500 9861 0 | Totals 86524 25596 984
"""
PAPER = [row.split() for row in TABLE_1.strip().replace("\n", "|").split("|")]
PAPER = {" ".join(words[:-3]): list(map(int, words[-3:])) for words in PAPER}


# ---------------------------------------------------------------- the real metadata


@pytest.fixture(scope="module")
def real():
    return read(REAL)


@needs_real
def test_table_1_of_paper_004_in_every_cell(real):
    table = table_1(real)
    assert list(table.columns) == ["Train", "Test", "Box"]
    assert {name: row.tolist() for name, row in table.iterrows()} == PAPER and len(PAPER) == 18


@needs_real
def test_counts_of_the_real_metadata(real):
    who = real.table["patient"].to_numpy()
    assert real.name == "ChestX-ray14" and len(real) == 112_120 and len(set(who)) == 30_805
    train_val, test = (real.lists[k] for k in ("train_val", "test"))
    assert (len(train_val), len(test)) == (86_524, 25_596)
    assert (len(set(who[train_val])), len(set(who[test]))) == (28_008, 2_797) and not set(who[train_val]) & set(who[test])
    assert real.table["view"].value_counts().to_dict() == {"PA": 67_310, "AP": 44_810}


@needs_real
def test_boxes_of_the_real_metadata(real):
    who, boxes = real.table["patient"].to_numpy(), real.boxes
    assert (len(boxes), len(real.boxed), len(set(who[real.boxed]))) == (984, 880, 726)
    assert np.isin(real.boxed, real.lists["test"]).all()
    _, images = np.unique(who[real.boxed].astype(str), return_counts=True)
    assert (images > 1).sum() == 109
    others = np.setdiff1d(np.flatnonzero(np.isin(who.astype(str), who[real.boxed].astype(str))), real.boxed)
    assert len(others) == 15_058 and np.isin(others, real.lists["test"]).all()
    assert (real.labels[boxes["row"], boxes["finding"]] == 1).all()  # each boxed class is among the image's labels
    corners = boxes[["x0", "y0", "x1", "y1"]].to_numpy()
    assert corners.min() >= 0 and corners.max() <= 1 and (corners[:, 2:] > corners[:, :2]).all()
    area = boxes.assign(area=100 * np.prod(corners[:, 2:] - corners[:, :2], 1)).groupby("finding")["area"].median()
    assert area[FINDINGS.index("Nodule")] == pytest.approx(0.5, abs=0.05) and area.idxmax() == FINDINGS.index("Cardiomegaly")
    assert area[FINDINGS.index("Cardiomegaly")] == pytest.approx(17, abs=0.5) and set(boxes["finding"]) == set(range(len(BOXED)))


@needs_real
def test_the_first_official_box_is_x_y_w_h_in_pixels_of_1024(real):
    x, y, w, h = 225.084745762712, 547.019216763771, 86.7796610169491, 79.1864406779661
    first = real.boxes.iloc[0]
    assert real.table["image"][int(first["row"])] == "00013118_008.png"
    np.testing.assert_allclose(first[["x0", "y0", "x1", "y1"]].astype(float) * 1024, [x, y, x + w, y + h])


@needs_real
def test_files_of_the_real_set(real):
    kinds = [p.suffix for p in real.paths if p]
    assert real.present.sum() == 1_522 and (kinds.count(".jpg"), kinds.count(".png")) == (1_491, 31)
    assert all(p.stem == Path(n).stem for p, n in zip(real.paths, real.table["image"]) if p)


@needs_real
def test_the_card_from_the_command_line_takes_seconds():
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-m", "cxr_book.data", str(REAL)], capture_output=True, text=True, timeout=120)
    seconds = time.monotonic() - start
    assert out.returncode == 0, out.stderr
    assert "112,120 of 30,805 patients" in out.stdout and "patients in both: 0" in out.stdout
    assert "1,522 present" in out.stdout and "110,598 missing" in out.stdout and "984 on 880 images of 726" in out.stdout
    for name, counts in PAPER.items():
        line = next(line for line in out.stdout.splitlines() if line.startswith(f"| {name} "))
        assert [int(cell.replace(",", "")) for cell in line.split("|")[2:5]] == counts
    assert seconds < 30, f"{seconds:.1f} s"  # about 2 s on a quiet machine


@needs_chest
def test_chest_masks():
    r = read(CHEST)
    assert len(r) == 42 and r.present.all() and set(r.masks) == {"left_lung", "right_lung", "heart"}
    assert all(all(files) for files in r.masks.values()) and r.table["patient"].nunique() == 42
    for files in r.masks.values():
        assert [f.stem for f in files] == [p.stem for p in r.paths]
    by_page = read(CHEST, patient="url").table
    assert by_page["patient"].nunique() == 33
    same = by_page[by_page["image"].str.startswith("pneumococcal-pneumonia-day")]
    assert len(same) == 3 and same["patient"].nunique() == 1
    by_name = read(CHEST, patient=r"(.+?)-day-?\d+").table.set_index("image")["patient"]
    assert by_name["pneumococcal-pneumonia-day35.jpg"] == "pneumococcal-pneumonia"


# ---------------------------------------------------------------- written by the test

HEAD = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,\
OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
ROWS = [
    ("00000001_000.png", "Cardiomegaly|Emphysema", 0, 1, 57),
    ("00000001_001.png", "No Finding", 1, 1, 58),
    ("00000002_000.png", "Infiltration", 0, 2, 80),
    ("00000003_000.png", "Hernia", 0, 3, 9),
]
BOX_HEAD = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
CSV, BOX, TRAIN, TEST = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"


def entries(rows=ROWS, first_release=False):
    age = (lambda a: f"{a:03d}Y") if first_release else str
    end = "," if first_release else ""
    lines = [f"{i},{lab},{f},{p},{age(a)},M,PA,2500,2048,0.168,0.168{end}" for i, lab, f, p, a in rows]
    return "\n".join([HEAD + end, *lines]) + "\n"


@pytest.fixture
def make(tmp_path):
    def make(images=(), name="set", **files):
        texts = {
            CSV: entries(), BOX: f"{BOX_HEAD}\n00000002_000.png,Infiltrate,512,256,256,128\n",
            TRAIN: "00000001_000.png\n00000001_001.png\n", TEST: "00000002_000.png\n00000003_000.png\n",
            **{k.replace("__", "."): v for k, v in files.items()},
        }  # fmt: skip
        root = tmp_path / name
        root.mkdir()
        for file, text in texts.items():
            if text is not None:
                (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        for image in images:
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            (root / image).write_bytes(b"not read here")
        return root

    return make


def test_it_reads_what_is_right(make):
    r = read(make(["images/00000002_000.jpeg", "masks/heart/00000002_000.png", "masks/Mass/00000001_000.png", "masks/x/y.png"]))
    assert len(r) == 4 and r.labels.sum() == 4 and r.present.tolist() == [False, False, True, False]
    assert r.boxes.values.tolist() == [[2, 3, 0.5, 0.25, 0.75, 0.375]]
    assert set(r.masks) == {"heart", "Mass"} and [bool(m) for m in r.masks["heart"]] == [False, False, True, False]
    assert r.table["patient"].tolist() == ["1", "1", "2", "3"] and r.table["age"].tolist() == [57, 58, 80, 9]


def test_a_drawn_set_is_named_so(make):
    assert read(make(drawn__json="{}")).name == "drawn set"


def test_both_releases_give_equal_results(make):
    new = read(make(name="new"))
    old = read(make(name="old", **{CSV: None, "Data_Entry_2017.csv": entries(first_release=True)}))
    assert new.table.equals(old.table) and np.array_equal(new.labels, old.labels) and new.boxes.equals(old.boxes)
    assert new.fingerprint == old.fingerprint


def test_the_later_release_wins(make):
    both = read(make(**{"Data_Entry_2017.csv": entries(ROWS[:2], first_release=True)}))
    assert len(both) == 4


def test_windows_line_ends_and_byte_order_mark(make):
    text = lambda s: b"\xef\xbb\xbf" + s.replace("\n", "\r\n").encode()  # noqa: E731
    plain = read(make(name="plain"))
    other = make(name="other", **{CSV: text(entries()), TRAIN: text("00000001_000.png\n\n00000001_001.png\n")})
    assert read(other).fingerprint == plain.fingerprint


def test_images_in_twelve_folders(make):
    images = ["images_001/images/00000001_000.png", "images_012/images/00000003_000.png"]
    r = read(make(images))
    assert r.present.tolist() == [True, False, False, True]
    flat = read(make([f"images/{Path(i).name}" for i in images], name="flat"))
    assert flat.fingerprint == r.fingerprint  # the same files elsewhere are the same data


@pytest.mark.parametrize("kind", [".jpg", ".jpeg", ".bmp", ".tif", ".webp", ".JPG"])
def test_the_original_png_is_preferred(make, kind):
    r = read(make([f"images/00000001_000{kind}", "images/00000001_000.png", f"images/00000003_000{kind}"]))
    assert r.paths[0].suffix == ".png" and r.paths[3].suffix == kind


def test_scan_passes_over_what_is_no_image(make):
    root = make(["images/._a.png", "images/a.txt", "images/b.png/inner.png", "images/c.png"])
    assert set(scan([root / "images", root / "absent"])) == {"c"}
    os.symlink(root / "gone.png", root / "images" / "d.png")
    assert set(scan([root / "images"])) == {"c"}


def test_lists_and_boxes_may_be_absent(make):
    r = read(make(**{BOX: None, TRAIN: None, TEST: None}))
    assert r.lists == {} and len(r.boxes) == 0 and "All" in table_1(r) and "a split has to be made" in data_card(r)


def test_the_fingerprint_changes_with_what_matters(make):
    variants = {
        "same": {}, "label": {CSV: entries().replace("Hernia", "Mass")}, "patient": {CSV: entries().replace(",2,80", ",4,80")},
        "box": {BOX: f"{BOX_HEAD}\n00000002_000.png,Infiltrate,512,256,256,129\n"}, "list": {TEST: "00000002_000.png\n"},
    }  # fmt: skip
    prints = {name: read(make(name=name, **files)).fingerprint for name, files in variants.items()}
    prints["file"] = read(make(["images/00000001_000.png"], name="file")).fingerprint
    root = make(["images/00000001_000.png"], name="size")
    (root / "images/00000001_000.png").write_bytes(b"longer than it was before")
    prints["size"] = read(root).fingerprint
    assert len(set(prints.values())) == len(prints)
    assert read(make(name="again")).fingerprint == prints["same"]


BOX_ROW = "\n00000002_000.png,Infiltrate,"
BAD = {
    "missing column": ({CSV: entries().replace("Finding Labels", "Labels")}, [CSV, "'Finding Labels'", "Patient ID"]),
    "no patient column": ({CSV: entries().replace("Patient ID", "ID")}, [CSV, "'Patient ID'"]),
    "unknown label": ({CSV: entries().replace("Hernia", "Hernai")}, [CSV, "row 5", "'Hernai'", "did you mean 'Hernia'"]),
    "empty label": ({CSV: entries().replace("Hernia", "")}, [CSV, "row 5", "No Finding"]),
    "label of two minds": ({CSV: entries().replace("Hernia", "Hernia|No Finding")}, [CSV, "row 5", "keep one"]),
    "no patient": ({CSV: entries().replace(",3,9,", ",,9,")}, [CSV, "row 5", "patient"]),
    "follow-up": ({CSV: entries().replace("Hernia,0", "Hernia,x")}, [CSV, "row 5", "follow_up", "'x'"]),
    "image twice": ({CSV: entries([*ROWS, ROWS[0]])}, [CSV, "row 6", "00000001_000.png", "row 2"]),
    "traversal": ({CSV: entries().replace("00000003_000.png", "../../etc/passwd")}, [CSV, "row 5", "../../etc/passwd"]),
    "absolute": ({CSV: entries().replace("00000003_000.png", "/etc/passwd")}, [CSV, "row 5", "/etc/passwd"]),
    "backslash": ({CSV: entries().replace("00000003_000.png", "..\\x.png")}, [CSV, "row 5", "bare file name"]),
    "short row": ({CSV: entries() + "00000009_000.png,Mass\n"}, [CSV, "row 6", "2 values"]),
    "zero bytes": ({CSV: b""}, [CSV, "empty"]),
    "header only": ({CSV: HEAD + "\n"}, [CSV, "no rows"]),
    "no csv": ({CSV: "<!DOCTYPE html>\n<html></html>\n"}, [CSV, "Image Index", "<!DOCTYPE html>"]),
    "binary": ({CSV: b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256))}, [CSV, "UTF-8"]),
    "nul": ({CSV: b"\0" * 100}, [CSV]),
    "latin-1": ({CSV: entries().replace("Hernia", "H\xe9rnia").encode("latin-1")}, [CSV, "UTF-8"]),
    "open quote": ({CSV: entries() + '"00000009_000.png,Mass'}, [CSV]),
    "box right of the image": ({BOX: BOX_HEAD + BOX_ROW + "800,0,225,10"}, [BOX, "row 2", "800, 0, 225, 10"]),
    "box below the image": ({BOX: BOX_HEAD + BOX_ROW + "0,800,10,225"}, [BOX, "row 2"]),
    "box left of the image": ({BOX: BOX_HEAD + BOX_ROW + "-1,0,10,10"}, [BOX, "row 2"]),
    "box without width": ({BOX: BOX_HEAD + BOX_ROW + "0,0,0,10"}, [BOX, "row 2", "empty"]),
    "box inside out": ({BOX: BOX_HEAD + BOX_ROW + "9,9,5,-5"}, [BOX, "row 2"]),
    "box of words": ({BOX: BOX_HEAD + BOX_ROW + "a,0,1,1"}, [BOX, "row 2", "x is 'a'"]),
    "box of nan": ({BOX: BOX_HEAD + BOX_ROW + "1,nan,1,1"}, [BOX, "row 2", "y is 'nan'"]),
    "box of an unknown image": ({BOX: f"{BOX_HEAD}\n9.png,Mass,1,1,1,1"}, [BOX, "row 2", "'9.png'"]),
    "box of an unknown finding": ({BOX: f"{BOX_HEAD}\n00000002_000.png,Mas,1,1,1,1"}, [BOX, "row 2", "'Mas'", "'Mass'"]),
    "box file without columns": ({BOX: "a,b\n1,2\n"}, [BOX, "has: a, b"]),
    "box file empty": ({BOX: ""}, [BOX, "empty"]),
    "list with an unknown image": ({TEST: "00000002_000.png\n77.png\n"}, [TEST, "row 2", "'77.png'"]),
    "list with a path": ({TEST: "../../etc/passwd\n"}, [TEST, "row 1", "../../etc/passwd"]),
    "list with an image twice": ({TEST: "00000002_000.png\n00000002_000.png\n"}, [TEST, "row 2", "row 1"]),
    "list empty": ({TEST: "\n"}, [TEST, "empty"]),
    "list binary": ({TEST: b"\xff\xfe\x00"}, [TEST, "UTF-8"]),
    "one list only": ({TEST: None}, [TEST, "missing"]),
    "image in both lists": ({TEST: "00000001_000.png\n"}, ["00000001_000.png", TRAIN, TEST]),
    "patient in both lists": ({TEST: "00000001_001.png\n", TRAIN: "00000001_000.png\n"}, ["patient '1'", TRAIN, TEST]),
    "no csv but lists": ({CSV: None}, [CSV, "Looked for", TEST]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_file_row_and_word(make, case):
    files, words = BAD[case]
    root = make(["images/00000001_000.png"], **files)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with pytest.raises(CxrError) as e:
        read(root)
    assert all(w in str(e.value) for w in words), str(e.value)
    assert len(str(e.value)) < 900 and before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_half_a_pixel_of_rounding_is_forgiven(make):
    r = read(make(**{BOX: BOX_HEAD + BOX_ROW + "-0.4,0,1024.8,1024.4"}))
    assert r.boxes.iloc[0, 2:].tolist() == [0, 0, 1, 1]


def test_folders_that_hold_no_data_set(tmp_path):
    with pytest.raises(CxrError, match="no such folder"):
        read(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CxrError, match="is a file"):
        read(tmp_path / "file")
    with pytest.raises(CxrError, match="Looked for Data_Entry_2017_v2020.csv .*JPCLN001.*images/.*Found: file"):
        read(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(CxrError, match="holds no image"):
        read(tmp_path)
    with pytest.raises(CxrError, match="unpack JSRT"):
        read_jsrt(tmp_path)
    with pytest.raises(CxrError, match="Data_Entry_2017_v2020.csv"):
        read_chestxray14(tmp_path)


def test_the_command_line_explains_itself(make):
    run = lambda *a: subprocess.run([sys.executable, "-m", "cxr_book.data", *a], capture_output=True, text=True)  # noqa: E731
    bare, wrong = run(), run("no-such-folder")
    said = " ".join((bare.stdout + bare.stderr).split()).lower()
    assert "usage" in said and "root" in said and "data card" in said
    assert wrong.returncode == 1 and "no such folder" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("folder", ["", "All247images/", "images/"])
@pytest.mark.parametrize("masks", ["scratch/fold{}/masks/left lung/{}.gif", "fold{}/masks/left_lung/{}.png"])
def test_jsrt(make, folder, masks, tmp_path):
    names = ["JPCLN001", "JPCLN002", "JPCNN001", "JPCNN092"]
    files = [f"{folder}{n}.IMG" for n in names] + [masks.format(2 - int(n[-3:]) % 2, n) for n in names[:3]]
    for file in [*files, f"{folder}JPCLN001.png", f"{folder}notes.png"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    r = read(tmp_path)
    assert r.name == "JSRT" and r.table["patient"].tolist() == names and all(p.suffix == ".IMG" for p in r.paths)
    assert r.labels[:, FINDINGS.index("Nodule")].tolist() == [1, 1, 0, 0] and r.labels.sum() == 2
    assert {k: v.tolist() for k, v in r.lists.items()} == {"fold1": [0, 2], "fold2": [1, 3]}
    assert [m.stem if m else None for m in r.masks["left_lung"]] == [*names[:3], None]


def test_a_plain_folder_with_a_csv(tmp_path):
    for file in ("images/a.png", "images/b.jpg", "right lung/a.png", "masks/heart/b.png", "other/z.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    assert read(tmp_path).table["patient"].tolist() == ["a", "b"] and set(read(tmp_path).masks) == {"right_lung", "heart"}
    (tmp_path / "images.csv").write_text("image,patient,labels,view\nb.jpg,7,Mass,AP\na.png,7,No Finding,PA\n")
    r = read(tmp_path)
    assert r.table["patient"].tolist() == ["7", "7"] and r.labels.sum(1).tolist() == [1, 0] and r.table["view"][0] == "AP"
    assert read_folder(tmp_path, patient="view").table["patient"].tolist() == ["AP", "PA"]
    for text, words in (("picture\na.png\n", "'image'"), ("image,patient\na.png,\n", "row 2"), ("image\n../a.png\n", "row 2")):
        (tmp_path / "images.csv").write_text(text)
        with pytest.raises(CxrError, match=words):
            read(tmp_path)
