"What the page on realism says is measured, is of the drawings as they are now, and holds no image."

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_book.core import BOXED, FINDINGS, CxrError, read_json
from cxr_book.phantom import VERSION, PhantomSettings, draw_dataset
from cxr_book.realism import (
    STEPS,
    counterfactual,
    describe_boxes,
    draw_pairs,
    lift,
    measure,
    mixture,
    reported_file,
    rings,
    score_difference,
    transfer,
)
from cxr_book.transfer import ASKED, TransferSettings, asked_rows, dark_pieces, ill_or_none

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"
real_images = pytest.mark.skipif(not (SHARED / "chestxray14").is_dir(), reason="no real radiographs beside this checkout")


def numbers(value):
    "All numbers of a nested value, in order."
    if isinstance(value, dict):
        return [n for k in sorted(value) for n in numbers(value[k])]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def longest(value):
    "The longest list of numbers in a nested value, counted over all its levels."
    if isinstance(value, dict):
        return max([0, *map(longest, value.values())])
    return len(numbers(value)) if isinstance(value, list) else 0


@real_images
def test_real_statistics_are_those_of_the_images(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path))
    here = json.loads(json.dumps(measure(SHARED / "chestxray14", SHARED / "chest_masks")))
    told = read_json(reported_file("real_statistics.json"))
    a, b = numbers(here), numbers(told)
    assert here.keys() == told.keys() and len(a) == len(b) and np.allclose(a, b, atol=2e-3, rtol=1e-3)


def test_real_statistics_are_aggregates():
    told = read_json(reported_file("real_statistics.json"))
    assert longest(told) <= 14 * 14  # no list is long enough for an image
    assert abs(sum(told["images"]["grey"]) - 1) < 1e-3
    assert [told["boxes"][f]["area"]["n"] for f in BOXED] == [180, 146, 153, 123, 85, 79, 120, 98]
    assert told["masks"]["lungs"]["n"] == 42


def test_transfer_was_measured_with_the_drawings_as_they_are():
    told = read_json(reported_file("transfer.json"))
    assert told.keys() == STEPS.keys()
    for name, step in told.items():
        assert step["asked"]["phantom"] == VERSION, f"{name}: the drawings have changed; run `python -m cxr_book.realism transfer`"
        assert step["minutes"] > 0 and step["stamp"]["libraries"]["torch"]
    assert longest(told["cue"]["result"]["heat"]) <= 16 * 16  # a mean over images, and coarse


def test_transfer_was_asked_what_the_command_asks():
    told, settings = read_json(reported_file("transfer.json")), TransferSettings()
    for name, (_, keys) in STEPS.items():
        now = settings.model_dump(mode="json", include={*keys, "n_drawn", "drawn_size", "drawn_seed", "n_boot"})
        assert told[name]["asked"]["settings"] == json.loads(json.dumps(now)), name


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from cxr_book.data import read

    folder = tmp_path_factory.mktemp("drawn")
    return read(draw_dataset(PhantomSettings(n_images=60, size=64, seed=4), folder / "set", workers=1))


def test_a_mixture_divides_patients_and_says_who_is_real(drawn):
    both, split = mixture(drawn, drawn, 20)
    assert len(both) == 40 and both.labels[:20, 0].all() and not both.labels[20:, 0].any()
    assert sum(len(getattr(split, s)) for s in ("train", "valid", "test")) == 40
    assert len(set(both.table.patient[:20]) & set(both.table.patient[20:])) == 0


def test_asked_rows_are_ill_or_without_any_finding(drawn):
    rows, ill = asked_rows(drawn, np.arange(len(drawn)))
    y = drawn.labels[rows]
    assert (y[ill][:, ASKED].any(1)).all() and not y[~ill].any()


def test_the_score_is_the_chance_of_either_over_that_of_none():
    z = np.random.default_rng(0).normal(size=(50, 14)) * 4
    p = 1 / (1 + np.exp(-z))
    assert np.allclose(ill_or_none(z), np.log((1 - (1 - p[:, ASKED]).prod(1)) / (1 - p).prod(1)))


def test_an_empty_image_has_no_dark_pieces():
    assert not np.any(dark_pieces(np.full((32, 32), 90, np.uint8)))


def test_rings_cover_each_frequency_once():
    ring, edges = rings(64)
    f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(64, 1 / 64)] * 2))
    assert ((ring >= 0) == ((f >= 1) & (f < 32))).all()
    assert all(f[ring == r].min() >= edges[r] and f[ring == r].max() < edges[r + 1] for r in range(len(edges) - 1))


def test_unknown_experiment():
    with pytest.raises(CxrError, match="did you mean 'cue'"):
        transfer("a", "b", "c.json", only="cues")


def test_lift_of_findings_that_exclude_each_other():
    pairs = np.zeros((14, 14), int)
    pairs[0, 0] = pairs[1, 1] = 500
    value = lift(pairs, 1000)
    assert value[0, 1] < -5 and np.isnan(value[0, 0]) and np.isnan(value[2, 3])


def test_boxes_of_a_finding_that_has_none():
    assert describe_boxes(pd.DataFrame(columns=["row", "finding", "x0", "y0", "x1", "y1"])) == {}


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_counterfactual_differs_inside_the_mask_alone(finding):
    pair = counterfactual(PhantomSettings(size=96, seed=1), 2, 0, finding)
    mask = pair.with_it.masks[finding]
    assert finding not in pair.without.masks and not pair.difference[~mask].any() and pair.difference[mask].any()


def test_pairs_are_the_same_twice(tmp_path):
    a, b = (draw_pairs(tmp_path / k, 3, PhantomSettings(size=64)) for k in "ab")
    for f in sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*")):
        assert (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes(), f
    assert a.read_text().count("\n") == 4 and b.exists()


def test_the_difference_as_heat_scores_best():
    rng = np.random.default_rng(0)
    changed = (rng.random((4, 32, 32)) < 0.1).astype(np.uint8) * 40
    own, other = score_difference(changed / 40, changed), score_difference(rng.random((4, 32, 32)), changed)
    assert all((own[k] > other[k]).all() or k == "pointing" for k in own) and (own["energy"] == 1).all()


@pytest.mark.slow
def test_the_page_in_small(tmp_path, run_here):
    run_here(ROOT / "nbs" / "09b_realism.ipynb", tmp_path, preset="smoke")
