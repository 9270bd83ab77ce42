"What the notebook of `results` cannot say: the interval of a paired difference, odd rules, odd data, names that are wrong."

from dataclasses import replace

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as h_settings
from hypothesis import strategies as st

from cxr_book import results as R
from cxr_book.classification import patient_weights, summarise
from cxr_book.core import FINDINGS, CxrError, reported
from cxr_book.evaluation import Predictions
from cxr_book.localization import BoxRule
from cxr_book.study import StudySettings, open_study
from cxr_book.viz import paper_column, show_gallery, show_panels


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_BOOK_HOME", str(home))
        settings = StudySettings.from_preset("smoke", image_size=32, batch_size=8, valid=0.25, n_boot=40)
        return open_study(settings, "99_tests", home / "run")


def guess(study, part, seed, rows=None):
    "Predictions that look at nothing: noise in maps of 8 x 8 cells."
    rng = np.random.default_rng(seed)
    n = np.array(getattr(study.split, part))
    m = np.intersect1d(n, study.radiographs.boxed) if rows is None else rows
    maps = rng.normal(size=(len(m), 14, 8, 8)).astype(np.float32)
    affine = np.tile(np.eye(3, dtype=np.float32), (len(m), 1, 1))
    return Predictions(n, rng.normal(size=(len(n), 14)).astype(np.float32), maps, m, affine)


def made(study, rule=BoxRule(), chapter="99_tests"):
    parts = {name: (guess(study, "test", i), guess(study, "valid", 9 + i)) for i, name in enumerate("ab")}
    return R.Results(study, parts, rule, chapter)


@pytest.fixture(scope="module")
def results(study):
    return made(study)


# ---------------------------------------------------------------- paired differences


@h_settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_the_interval_of_a_difference_is_that_of_resampled_differences(n, seed, gaps):
    "A plain loop: draw the patients once, take both methods' means on the same draw, subtract."
    rng = np.random.default_rng(seed)
    a, b, finding, patients = rng.random(n), rng.random(n), rng.integers(0, 3, n), rng.integers(0, 6, n)
    if gaps:
        a[::3] = b[::3] = np.nan  # what neither has, as cases without a mask
    got = summarise(dict(x=a - b), finding, patients, 50, seed=3)["x"]["Mean"]
    position, counts = patient_weights(patients, 50, 3)

    def mean(values, weight):
        there = np.isfinite(values)
        kinds = [there & (finding == k) & (weight > 0) for k in np.unique(finding)]
        return np.mean([np.average(values[k], weights=weight[k]) for k in kinds if k.any()] or [np.nan])

    draws = [mean(a, c[position]) - mean(b, c[position]) for c in counts]
    draws = [d for d in draws if np.isfinite(d)]
    assert got["value"] == pytest.approx(mean(a, np.ones(n)) - mean(b, np.ones(n)), nan_ok=True)
    if draws:
        assert (got["low"], got["high"]) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))))


@pytest.mark.parametrize("rule", [BoxRule(threshold=0.7), BoxRule(rule="contours", threshold="otsu")])
def test_a_difference_is_that_of_the_tables(study, rule):
    results = made(study, rule)
    for mode in R.MODES:
        found = results.difference("a", "b", ("IoU", "FP", "mask IoU"), mode)
        for metric, row in found.iterrows():
            mean = results.mean(metric, mode).value
            assert row.value == pytest.approx(mean["a"] - mean["b"], abs=1e-12) and row.low <= row.value <= row.high
        assert found.index.name == "metric" and list(found) == ["value", "low", "high"]


def test_methods_with_maps_of_other_images_are_not_subtracted(study):
    test, valid = guess(study, "test", 0), guess(study, "valid", 1)
    less = guess(study, "test", 0, rows=test.map_rows[:-1])
    results = R.Results(study, {"a": (test, valid), "b": (less, valid)}, BoxRule(), "99_tests")
    with pytest.raises(CxrError, match="different images"):
        results.difference("a", "b")


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize("rule, threshold", [("contours", 0.7), ("largest", "otsu"), ("union", 1.0), ("patches", 0.7)])
def test_the_cases_are_what_the_tables_are_made_of(study, rule, threshold):
    results = made(study, BoxRule(rule=rule, threshold=threshold))
    cases = results.cases("a")
    assert np.array_equal(cases.overlap, results.pair_values("a")[1]["IoU"])
    for k in np.unique(cases.pairs.finding):
        mean = cases.overlap[cases.pairs.finding == k].mean()
        assert mean == pytest.approx(results.column("a", "IoU", "fixed").value[FINDINGS[k]])
    assert len(cases.boxes) == len(cases.heat) == len(cases.prob) and {b.shape[1:] for b in cases.boxes} == {(4,)}
    assert (rule == "patches") == (not any(map(len, cases.boxes)))
    assert show_panels([*cases.best(), *cases.missed()]) is not None


def test_the_probability_is_of_the_case_also_when_the_rows_come_in_disorder(study, results):
    test, valid = results.predictions["a"]
    mixed = replace(test, rows=test.rows[::-1].copy(), logits=test.logits[::-1].copy())
    other = R.Results(study, {"a": (mixed, valid)}, BoxRule(), "99_tests").cases("a")
    assert np.array_equal(other.prob, results.cases("a").prob)
    i = len(other.prob) // 2
    at = np.flatnonzero(test.rows == other.pairs.row[i])[0]
    assert other.prob[i] == pytest.approx(torch.tensor(test.logits[at, other.pairs.finding[i]]).sigmoid().item())


def test_failures_are_of_the_surer_half_and_a_panel_shows_its_case(study, results):
    cases = results.cases("a")
    shown = {id(p.truth): p for p in cases.missed(14)}
    assert shown and len({p.title.split("  ")[0] for p in shown.values()}) == len(shown)
    floor = np.median(cases.prob)
    assert all(float(p.title.split("  ")[1]) >= round(floor, 2) for p in shown.values())
    panel = cases.panel(2, "mine")
    row = int(cases.pairs.row[2])
    assert panel.title == "mine" and np.array_equal(panel.truth, cases.pairs.boxes[2])
    assert np.array_equal(panel.image, study.cache.images[study.cache.position(np.array([row]))[0]])


# ---------------------------------------------------------------- tables


def lines(markdown):
    return [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]


def with_scores(results, rows):
    "The same results with invented scores: rows of method, mode, metric, value of the mean."
    other = object.__new__(R.Results)
    other.__dict__ |= results.__dict__
    full = [(m, mode, metric, f, v, v - 0.1, v + 0.1, 5) for m, mode, metric, v in rows for f in ("Mass", "Mean")]
    other.scores = pd.DataFrame(full, columns=["method", "mode", "metric", "finding", "value", "low", "high", "n"])
    return other


def test_the_best_is_bold_in_each_kind_of_threshold_and_ties_are_too(results):
    values = [("a", "fixed", 0.5), ("b", "fixed", 0.50004), ("control: mean box", "given", 0.2), ("a", "oracle", 0.1)]
    rows = [(m, mode, metric, v) for m, mode, v in values for metric in ("IoU", "FP")]
    head, _, *body = lines(with_scores(results, rows).means(("IoU", "FP"), ("fixed", "oracle")))
    assert head == ["Method", "Threshold", "IoU", "FP"]
    bold = {(line[0], line[1]): tuple(cell.startswith("**") for cell in line[2:]) for line in body}
    assert bold == {
        ("a", "fixed"): (True, False), ("b", "fixed"): (True, False), ("control: mean box", "fixed"): (False, True),
        ("a", "oracle"): (False, True), ("control: mean box", "oracle"): (True, False),
    }  # fmt: skip
    assert body[0][2] == "**0.500 [0.400, 0.600]**"


def test_some_methods_in_the_order_asked_for(results):
    body = lines(results.means(("IoU",), ("validated",), ("b", "control: random", "a")))[2:]
    assert [line[0] for line in body] == ["b", "a"]  # noise has no validated threshold
    with pytest.raises(CxrError, match="did you mean 'b'|known"):
        results.means(("IoU",), methods=("bb",))


def test_on_real_data_the_best_is_bold_and_the_note_names_how_to_run_it(results):
    study = results.study
    settings = study.settings.but(data_root="my images", seed=3)
    real = object.__new__(R.Results)
    real.__dict__ |= results.__dict__ | dict(
        study=replace(study, settings=settings, radiographs=replace(study.radiographs, name="ChestX-ray14"))
    )
    assert not real.drawn and "not comparable" not in real.note
    assert real.note.endswith("-k python3 -p preset smoke -p data_root 'my images' -p seed 3`")
    below = pd.Series(-1.0, real.column("a", "IoU", "fixed").index)
    assert real.compare(below, "a", "FP", "fixed").count("**-1.000**") == len(below)  # less is better
    assert "**-1.000**" not in real.compare(below, "a", "IoU", "fixed")


def test_several_papers_settings_and_the_metric_on_patches(study):
    results = made(study, BoxRule(rule="patches", how="sigmoid", threshold=0.5))
    table = reported("003", 1)
    names = {"Ours": "a", "Li et al.": "b"}
    text = results.compare_methods(table, names, "T(IoU)=0.1 (patches)", "fixed", setting="un=20%")
    head, _, *body = lines(text)
    assert head == ["finding", "Ours", "Li et al."] and [line[0] for line in body][-1] == "Mean" and len(body) == 9
    theirs = paper_column(table, method="Ours", setting="un=20%", metric="T(IoU)=0.1")
    mine = results.column("a", "T(IoU)=0.1 (patches)", "fixed").value
    for line in body[:-1]:
        paper, ours, apart = line[1].split(" / ")
        finding = line[0].replace(" ", "_")
        assert float(paper) == pytest.approx(theirs[finding], abs=6e-4)
        if ours == "—":
            assert finding not in mine and apart == "—"
        else:
            assert float(apart) == pytest.approx(mine[finding] - theirs[finding], abs=6e-4)
    with pytest.raises(CxrError, match="say which"):
        results.compare_methods(table, names, "T(IoU)=0.1 (patches)", "fixed")
    papers = {"a": theirs, "b": theirs + 0.1}
    assert lines(results.compare(papers, "a", "T(IoU)=0.1", "fixed", against="b"))[0][1:3] == ["a", "b"]


@pytest.mark.parametrize(
    "ask, word",
    [
        (lambda r: r.column("aa", "IoU", "fixed"), "method = 'aa'"),
        (lambda r: r.column("a", "IOU", "fixed"), "did you mean 'IoU'"),
        (lambda r: r.column("a", "IoU"), "fixed, validated, oracle"),
        (lambda r: r.column("a", "IoU", "valid"), "fixed, validated, oracle"),
        (lambda r: r.cases("control: random"), "no maps here"),
        (lambda r: r.difference("a", "b", ("IoUU",)), "did you mean 'IoU'"),
        (lambda r: r.cases("a", "best"), "known: fixed, validated, oracle"),
    ],
)
def test_a_wrong_name_says_what_is_right(results, ask, word):
    with pytest.raises(CxrError, match=word):
        ask(results)


# ---------------------------------------------------------------- data without boxes


@pytest.mark.parametrize("labelled", [True, False])
def test_without_boxes_everything_answers(study, labelled):
    labels = study.radiographs.labels if labelled else np.zeros_like(study.radiographs.labels)
    bare = replace(study, radiographs=replace(study.radiographs, boxes=study.radiographs.boxes[:0], labels=labels))
    none = np.zeros(0, np.int64)
    rows = {p: (None if labelled else none) for p in ("test", "valid")}
    parts = tuple(guess(study, p, i, rows[p]) for i, p in enumerate(("test", "valid")))
    results = R.Results(bare, {"a": parts}, BoxRule(), "99_tests")
    assert results.means() == R.NO_BOXES and R.NO_BOXES in results.means(("AUROC", "IoU"))
    assert results.difference("a", "a").isna().all(axis=None) and not len(results.mean("IoU", "fixed"))
    column = paper_column(reported("004", 3), method="FE")
    assert R.NO_BOXES in results.compare(column, "a", "IoU", "fixed") and len(lines(results.compare(column, "a", "IoU"))) == 11
    cases = results.cases("a")
    assert len(cases.heat) == 0 and cases.best() == cases.missed() == R.truth_panels(bare) == []
    assert show_panels(cases.best()).axes[0].texts and show_gallery(R.truth_panels(bare)).axes[0].texts
