"The findings: exact masks, boxes like the real ones, one finding at any size, sides, determinism, no cost that grows wild."

import csv
from pathlib import Path

import numpy as np
import pytest
from cxr_book.anatomy import CM, absorption, stand
from cxr_book.core import BOXED, FINDINGS, CxrError, finding_index
from cxr_book.findings import SIGNS, SOURCES, VISIBLE, sign
from cxr_book.opacities import compact

REAL = Path(__file__).parents[2] / "shared" / "chestxray14" / "BBox_List_2017.csv"
ONE_SIDE = ("Atelectasis", "Mass", "Nodule", "Pneumothorax", "Consolidation", "Pleural_Thickening")


def person(seed, size=128):
    rng = np.random.default_rng(seed)
    ap, female = rng.random() < 0.4, rng.random() < 0.45
    a = stand(size, *(np.random.default_rng([seed, k]) for k in (1, 2)), ap, female)
    absorption(a, np.random.default_rng([seed, 3]))
    return a


@pytest.fixture(scope="module")
def people():
    return [person(seed) for seed in range(30)]


def draw(a, name, seed, side=1, severity=0.5):
    return sign(a, name, np.random.default_rng([seed, 7]), side, severity)


def box(mask):
    "cx, cy, w, h as fractions of the image."
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    n = len(mask)
    return (x[0] + x[-1] + 1) / 2 / n, (y[0] + y[-1] + 1) / 2 / n, (x[-1] + 1 - x[0]) / n, (y[-1] + 1 - y[0]) / n


def boxes_of(people, name, n):
    rng, out = np.random.default_rng(5), []
    for k in range(n):
        _, mask = draw(people[k % len(people)], name, k, int(rng.choice((-1, 1))), float(rng.random()))
        out.append(box(mask))
    return np.array(out)


def real_boxes():
    if not REAL.exists():
        pytest.skip(f"{REAL.name} is not here")
    found = {name: [] for name in BOXED}
    with open(REAL, newline="") as f:
        for row in list(csv.reader(f))[1:]:
            x, y, w, h = (float(t) / 1024 for t in row[2:6])
            found[FINDINGS[finding_index(row[1])]].append((x + w / 2, y + h / 2, w, h))
    return {name: np.array(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", FINDINGS)
def test_the_mask_is_exact_and_the_finding_is_the_same_again(people, name):
    for seed in range(6):
        for severity in (0.0, 0.5, 1.0):
            a = people[seed]
            change, mask = draw(a, name, seed, (-1) ** seed, severity)
            assert change.dtype == np.float32 and mask.dtype == bool and change.shape == mask.shape == a.u.shape
            assert mask.any() and not change[~mask].any() and np.isfinite(change).all()
            assert np.abs(change[mask]).min() > min(VISIBLE, 0.49 * np.abs(change).max())
            again = draw(a, name, seed, (-1) ** seed, severity)
            assert np.array_equal(change, again[0]) and np.array_equal(mask, again[1])


@pytest.mark.parametrize("name", FINDINGS)
def test_the_same_finding_at_128_and_512(name):
    worst = []
    for seed in range(3):
        small, large = (draw(person(seed, size), name, seed, 1, 0.6)[1] for size in (128, 512))
        large = large.reshape(128, 4, 128, 4).mean((1, 3)) > 0.5
        worst.append((small & large).sum() / (small | large).sum())
    assert min(worst) > 0.75, worst


@pytest.mark.parametrize("name", ONE_SIDE)
def test_it_stays_on_its_side(people, name):
    for seed, a in enumerate(people[:12]):
        for side in (-1, 1):
            change, mask = draw(a, name, seed, side)
            assert not mask[a.side != side].any()


@pytest.mark.parametrize("name", FINDINGS)
def test_graver_is_more(people, name):
    "Follow-ups draw the same generator at another severity: the finding grows or shrinks, it does not jump."
    total = {s: [float(np.abs(draw(a, name, k, 1, s)[0]).sum()) for k, a in enumerate(people[:10])] for s in (0.1, 0.5, 0.9)}
    assert np.mean(total[0.1]) < np.mean(total[0.5]) < np.mean(total[0.9])
    jumps = []
    for k, a in enumerate(people[:10]):
        (x0, y0, *_), (x1, y1, *_) = (box(draw(a, name, k, 1, s)[1]) for s in (0.50, 0.55))
        jumps.append(np.hypot(x1 - x0, y1 - y0))
    assert np.median(jumps) < 0.03


@pytest.mark.parametrize("name", BOXED)
def test_boxes_are_as_generous_as_the_real_ones(people, name):
    real, drawn = real_boxes()[name], boxes_of(people, name, 90)
    area = [100 * np.median(b[:, 2] * b[:, 3]) for b in (drawn, real)]
    assert 1 / 1.5 < area[0] / area[1] < 1.5, area
    for column in (2, 3):  # width, height: the middle half overlaps the real one
        low, high = (np.quantile(b[:, column], (0.25, 0.75)) for b in (drawn, real))
        assert low[0] < high[1] and high[0] < low[1]
    centre = np.median(np.abs(drawn[:, 0] - 0.5)) - np.median(np.abs(real[:, 0] - 0.5))
    assert abs(centre) < 0.08 and abs(np.median(drawn[:, 1]) - np.median(real[:, 1])) < 0.22


@pytest.mark.parametrize("name", [n for n in FINDINGS if n not in ("Cardiomegaly", "Edema", "Emphysema")])
def test_the_mean_box_is_a_poor_guess(people, name):
    b = boxes_of(people, name, 60)
    low, high = b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2
    mean_low, mean_high = b[:, :2].mean(0) - b[:, 2:].mean(0) / 2, b[:, :2].mean(0) + b[:, 2:].mean(0) / 2
    inter = np.clip(np.minimum(high, mean_high) - np.maximum(low, mean_low), 0, 1).prod(1)
    union = b[:, 2:].prod(1) + (mean_high - mean_low).prod() - inter
    assert (inter / union).mean() < 0.5


def test_signs(people):
    for k, a in enumerate(people[:12]):
        _, heart = draw(a, "Cardiomegaly", k, 1, k / 11)
        assert np.ptp(a.u[heart]) > a.body.width  # the cardiothoracic ratio is over one half
        change, _ = draw(a, "Emphysema", k, 1, k / 11)
        assert change.sum() < 0
        change, _ = draw(a, "Pneumothorax", k, 1, 0.2 + 0.8 * k / 11)
        assert change.min() < -0.05
        _, mask = draw(a, "Edema", k, 1, k / 11)
        assert mask[a.side < 0].any() and mask[a.side > 0].any()
        _, lump = draw(a, "Mass", k, 1, k / 11)
        if a.lung[1][lump].mean() > 0.9:
            assert np.ptp(a.v[lump]) > 2.4 * CM


def test_every_sign_names_its_source():
    assert tuple(SIGNS) == FINDINGS
    assert {key for s in SIGNS.values() for key in s.sources} <= SOURCES.keys()
    assert all(s.looks and s.sources for s in SIGNS.values())
    with pytest.raises(CxrError, match="Effusion"):
        sign(person(0, 64), "Efusion", np.random.default_rng(0), 1, 0.5)


def test_compact_keeps_patches_and_drops_specks():
    mask = np.zeros((100, 100), bool)
    mask[20:60, 20:60], mask[80:90, 70:90], mask[5, 5] = True, True, True
    out = compact(mask)
    assert out.sum() == mask.sum() - 1 and not out[5, 5]
    assert not compact(np.zeros((8, 8), bool)).any()
