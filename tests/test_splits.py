"""What the notebook of `splits` cannot say: the real metadata, and properties over random data sets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_book.core import CxrError
from cxr_book.data import NO_BOXES, Radiographs, read
from cxr_book.splits import SIDES, LeakySplit, Split, folds, leaks, official_split, paper001_split, stratify, without_patients

REAL = Path(__file__).parents[1] / ".." / "shared" / "chestxray14"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/chestxray14 is not here")


def radiographs(patients, labels, boxed=(), lists=None):
    "A data set without files."
    n = len(patients)
    table = pd.DataFrame({"image": [f"{i}.png" for i in range(n)], "patient": [str(p) for p in patients]})
    boxes = pd.DataFrame([(r, f, 0.1, 0.1, 0.2, 0.2) for r, f in boxed], columns=NO_BOXES.columns).astype(NO_BOXES.dtypes)
    return Radiographs("test", Path("."), table, np.asarray(labels, np.uint8), boxes, [None] * n, lists or {}, {})


# ---------------------------------------------------------------- the real metadata


@pytest.fixture(scope="module")
def real():
    return read(REAL)


@needs_real
@pytest.mark.parametrize("seed", [0, 1])
def test_official_split_of_the_real_metadata(real, seed):
    split = official_split(real, valid=0.1, seed=seed, present_only=False)
    assert np.array_equal(split.test, np.sort(real.lists["test"]))
    learn = np.sort(np.concatenate([split.train, split.valid]))
    assert np.array_equal(learn, np.sort(real.lists["train_val"]))
    share = real.labels[split.valid].sum(0) / real.labels[learn].sum(0)
    assert np.abs(share - 0.1).max() < 0.002, share  # Hernia: 14 of 141 images
    assert abs(len(split.valid) / len(learn) - 0.1) < 0.003
    who = real.table["patient"].to_numpy()
    per_patient = [len(r) / len(set(who[r])) for r in (split.train, split.valid)]
    assert per_patient[0] == pytest.approx(per_patient[1], rel=0.05)  # not only patients with few images validate
    assert "NO OFFICIAL" not in str(split)


@needs_real
def test_official_counts_are_checked(real):
    for name in ("train_val", "test"):
        edited = replace(real, lists=real.lists | {name: real.lists[name][1:]})
        with pytest.raises(CxrError, match=f"list {name} has .* the official one has"):
            official_split(edited, present_only=False)


@needs_real
def test_present_images_only(real):
    split = official_split(real)
    rows = np.concatenate([split.train, split.valid, split.test])
    assert np.array_equal(np.sort(rows), np.flatnonzero(real.present)) and len(split.test) == 128
    assert len(split.train) + len(split.valid) == 1_394 and real.labels[split.valid].any(0).all()


@needs_real
def test_paper_001_subset_of_the_real_metadata(real):
    split = paper001_split(real, present_only=False)
    rows = np.concatenate([split.train, split.valid])
    assert real.labels[rows].any(1).sum() == 36_024 and len(rows) == 41_024 and len(split.test) == 25_596
    share = real.labels[split.valid].sum(0) / real.labels[rows].sum(0)
    assert np.abs(share - 0.2).max() < 0.003 and abs(len(split.valid) / len(rows) - 0.2) < 0.003


@needs_real
def test_image_level_folds_leak_26_percent(real):
    share = [np.mean([leaks(real, *p).share for p in folds(real, 5, "image", s, present_only=False)]) for s in range(5)]
    assert np.mean(share) == pytest.approx(0.26, abs=0.015)
    parts = folds(real, 5, "patient", present_only=False)
    assert all(leaks(real, *p) == (0, 0.0, 0) for p in parts)
    assert np.array_equal(np.sort(np.concatenate([t for _, t in parts])), real.boxed) and len(real.boxed) == 880
    assert max(len(t) for _, t in parts) - min(len(t) for _, t in parts) <= 10
    per_fold = np.array([np.bincount(real.boxes["finding"][real.boxes["row"].isin(t)], minlength=8) for _, t in parts])
    assert (np.ptp(per_fold, 0) <= 4).all(), per_fold


@needs_real
def test_beside_a_fold_no_image_of_its_patients(real):
    _, test = folds(real, present_only=False)[0]
    rest = without_patients(real, real.lists["test"], of=test)
    assert leaks(real, rest, test).images == 0 and 0 < len(rest) < 25_596


# ---------------------------------------------------------------- properties

ids = st.lists(st.integers(0, 6), min_size=1, max_size=20)


@given(ids, st.data())
@settings(max_examples=150, deadline=None)
def test_a_split_never_has_a_patient_on_two_sides(patients, data):
    side_of = data.draw(st.lists(st.sampled_from([*SIDES, None]), min_size=len(patients), max_size=len(patients)))
    rows = {s: [i for i, x in enumerate(side_of) if x == s] for s in SIDES}
    seen = {}
    for p, s in zip(patients, side_of):
        seen.setdefault(p, set()).add(s)
    torn = sorted((p for p, sides in seen.items() if len(sides - {None}) > 1))
    if torn:
        with pytest.raises(CxrError, match="patient"):
            Split(**rows, patients=patients)
    else:
        split = Split(**rows, patients=patients)
        assert {s: getattr(split, s).tolist() for s in SIDES} == rows


def test_a_split_names_the_patient_and_refuses_other_nonsense():
    who = ["anna", "bert", "anna", "carl"]
    for rows, words in (
        (([0], [2], [3]), "patient 'anna' is in train and in valid"), (([1], [0], [2]), "'anna' is in valid and in test"),
        (([0, 0], [], []), "row 0 comes 2 times"), (([4], [], []), "rows 4 to 4"), (([-1], [], []), "rows -1"),
        (([0.5], [], []), "whole numbers"), (([True, False, True, False], [], []), "whole numbers"),
    ):  # fmt: skip
        with pytest.raises(CxrError, match=words):
            Split(*rows, patients=who)


@given(ids, st.data())
@settings(max_examples=100, deadline=None)
def test_a_leaky_split_lets_patients_be_on_two_sides_and_no_image(patients, data):
    n = len(patients)
    sides = [data.draw(st.lists(st.integers(0, n - 1), max_size=n, unique=True)) for _ in SIDES]
    if len(set().union(*sides)) < sum(map(len, sides)):
        with pytest.raises(CxrError, match="on two sides"):
            LeakySplit(*sides, patients)
    else:
        split = LeakySplit(*sides, patients)
        assert [getattr(split, side).tolist() for side in SIDES] == sides and isinstance(split, Split)
    for rows in ([0, 0], [n], [-1], [0.5]):
        with pytest.raises(CxrError, match="train"):
            LeakySplit(rows, [], [], patients)


def test_a_split_cannot_be_changed_afterwards():
    rows = np.array([0, 1])
    split = Split(rows, [], [], patients=["a", "b"])
    rows[0] = 1
    assert split.train.tolist() == [0, 1]
    with pytest.raises(ValueError):
        split.train[0] = 1
    with pytest.raises(AttributeError):
        split.train = rows


@given(st.integers(0, 10_000), st.integers(2, 40), st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_official_split_takes_every_row_once(seed, n_patients, valid, listed):
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), rng.integers(1, 6, n_patients))
    labels = rng.random((len(patients), 14)) < 0.2
    in_test = (np.arange(n_patients) % 4 == 0)[patients]
    lists = {"train_val": np.flatnonzero(~in_test), "test": np.flatnonzero(in_test)} if listed else None
    r = radiographs(patients, labels, lists=lists)
    split, again = (official_split(r, valid, seed, present_only=False) for _ in range(2))
    rows = np.concatenate([split.train, split.valid, split.test])
    assert np.array_equal(np.sort(rows), np.arange(len(r))) and np.array_equal(split.valid, again.valid)
    assert ("NO OFFICIAL LISTS" in split.name) != listed and (valid > 0 or len(split.valid) == 0)


@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from(["patient", "image"]))
@settings(max_examples=60, deadline=None)
def test_folds_partition_exactly(seed, k, by):
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(12), rng.integers(1, 5, 12))
    rows = np.unique(np.concatenate([np.searchsorted(patients, np.arange(12)), rng.integers(0, len(patients), 9)]))
    boxed = [(r, f) for r in rows for f in rng.choice(8, rng.integers(1, 3), replace=False)]
    r = radiographs(patients, np.zeros((len(patients), 14)), boxed)
    parts = folds(r, k, by, seed, present_only=False)
    assert len(parts) == k and np.array_equal(np.sort(np.concatenate([t for _, t in parts])), rows)
    for train, test in parts:
        assert len(test) and np.array_equal(np.sort(np.concatenate([train, test])), rows)
        who = r.table["patient"].to_numpy()
        assert by == "image" or not set(who[train]) & set(who[test])
        assert leaks(r, train, test).images == sum(p in set(who[train]) for p in who[test])
    some = rows[: len(rows) // 2]
    if len(some) > k and by == "image":
        assert np.array_equal(np.sort(np.concatenate([t for _, t in folds(r, k, by, seed, False, some)])), some)


def test_folds_refuse_what_cannot_be():
    r = radiographs([0, 0, 1], np.zeros((3, 14)), [(0, 1), (1, 1), (2, 1)])
    for args, words in (((5,), "k = 5: there are 2 boxed patients"), ((1,), "k = 1"), ((2, "scan"), "by = 'scan'")):
        with pytest.raises(CxrError, match=words):
            folds(r, *args, present_only=False)
    with pytest.raises(CxrError, match="0 boxed patients"):
        folds(r)  # no file is there


@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_stratify_meets_the_shares(seed, weights):
    rng = np.random.default_rng(seed)
    counts = (rng.random((300, 4)) < [0.05, 0.2, 0.5, 0]) * rng.integers(1, 4, (300, 1))
    counts[:, 3] = 5
    shares = np.array(weights) / sum(weights)
    part = stratify(counts, shares, seed)
    assert part.min() >= 0 and np.array_equal(part, stratify(counts, shares, seed))
    got = np.stack([counts[part == k].sum(0) for k in range(len(shares))])
    assert np.abs(got - shares[:, None] * counts.sum(0))[:, :3].max() <= 9  # three patients of three images
    assert np.abs(got - shares[:, None] * counts.sum(0))[:, 3].max() <= 5 * 30


def test_an_empty_part_is_served_first():
    counts = np.eye(6, dtype=int)  # every finding comes once: no part may take them all
    assert sorted(stratify(counts, np.full(3, 1 / 3), seed=1)) == [0, 0, 1, 1, 2, 2]


def test_shares_that_make_no_sense():
    r = radiographs([0, 1, 2, 3], np.zeros((4, 14)))
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(CxrError, match="makes no sense"):
            official_split(r, valid=share, present_only=False)
    with pytest.raises(CxrError, match="present_only=False"):
        official_split(r)


def test_paper_001_takes_all_positives_and_some_normals():
    patients = np.arange(300)
    labels = np.zeros((300, 14))
    labels[:100, 2] = 1
    r = radiographs(patients, labels, lists={"train_val": np.arange(250), "test": np.arange(250, 300)})
    for normals, expect in ((30, 30), (5000, 150), (0, 0)):
        split = paper001_split(r, normals=normals, present_only=False)
        rows = np.concatenate([split.train, split.valid])
        assert np.isin(np.arange(100), rows).all() and len(rows) == 100 + expect and len(split.test) == 50
        assert f"{expect} without" in split.name and len(split.valid) == pytest.approx(0.2 * len(rows), abs=2)
    a, b = (paper001_split(r, 30, seed=s, present_only=False) for s in (0, 1))
    assert not np.array_equal(np.sort(np.r_[a.train, a.valid]), np.sort(np.r_[b.train, b.valid]))
