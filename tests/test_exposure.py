"Exposures at every size, of any technique, and beside real ones."

import functools
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_book.anatomy import absorption, stand
from cxr_book.devices import DEVICES, STYLES, devices_of, draw_devices, marks
from cxr_book.exposure import Film, collimate, grain, technique

REAL = Path(__file__).resolve().parents[2] / "shared" / "chestxray14"
rng = np.random.default_rng


@functools.cache
def chest(size=128, patient=0, ap=False):
    a = stand(size, rng([patient, 1]), rng([patient, 2]), ap, bool(patient % 2))
    return a, absorption(a, rng([patient, 3]))


def picture(size, patient, ap):
    a, healthy = chest(size, patient, ap)
    change, _ = draw_devices(a, devices_of(rng([patient, 4]), rng([patient, 5]), ap))
    image = Film(healthy, rng([patient, 6]), ap)(healthy + change, grain(size, rng([patient, 7])))
    image, _ = collimate(image, rng([patient, 8]), ap, keep=(0.05, 0.05, 0.95, 0.9))
    return marks(image, rng([patient, 9]), ap)[0]


def reduced(image, size=64):
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_grey_rises_with_absorption_in_every_technique(seed, ap):
    healthy = chest(64, 0, ap)[1]
    film = Film(healthy, rng(seed), ap)
    greys = np.stack([film(healthy + np.float32(d)) for d in (-0.4, 0, 0.3, 1, 3)])
    assert greys.dtype == np.float32 and np.isfinite(greys).all() and greys.min() >= 0 and greys.max() <= 255
    assert (np.diff(greys, axis=0) >= 0).all()
    assert np.diff(greys, axis=0).mean() > 1  # and not all of it is clipped


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 100), st.integers(0, 100), st.integers(1, 28), st.integers(1, 28))
def test_a_crop_is_exposed_as_in_the_whole(seed, y, x, h, w):
    healthy, noise = chest()[1], grain(128, rng(1))
    film, where = Film(healthy, rng(seed)), (slice(y, y + h), slice(x, x + w))
    ill = healthy.copy()
    ill[where] += np.float32(0.5)
    whole, before = film(ill, noise), film(healthy, noise)
    assert (film(ill[where], noise[where], where=where) == whole[where]).all()
    outside = np.ones(whole.shape, bool)
    outside[where] = False
    assert (whole[outside] == before[outside]).all()


def test_inputs_stay_as_they_were():
    healthy, noise = chest()[1].copy(), grain(128, rng(1))
    kept = healthy.copy(), noise.copy()
    image = Film(healthy, rng(0))(healthy, noise)
    before = image.copy()
    collimate(image, rng(0)), marks(image, rng(0), True)
    assert (healthy == kept[0]).all() and (noise == kept[1]).all() and (image == before).all()


def test_the_same_generator_gives_the_same_picture():
    assert (picture(128, 3, True) == picture(128, 3, True)).all()
    assert technique(rng(4)) == technique(rng(4)) != technique(rng(5))


@pytest.mark.parametrize("size", [64, 96, 256, 1024])
def test_the_same_picture_at_every_size(size):
    for patient, ap in ((0, False), (1, True)):
        a, b = reduced(picture(size, patient, ap)), reduced(picture(512, patient, ap))
        assert np.abs(a - b).mean() < (6 if size < 96 else 4)


@pytest.mark.parametrize("size", [64, 256, 1024])
@pytest.mark.parametrize("name", DEVICES)
def test_devices_are_seen_at_every_size(name, size):
    a, healthy = chest(size, 0, True)
    for side in (-1, 1):
        change, mask = DEVICES[name](a, rng(2), side)
        assert change.shape == mask.shape == (size, size) and change.dtype == np.float32 and mask.dtype == bool
        assert change.max() > 0.25 and mask.sum() >= 8 and mask.mean() < 0.15
        film = Film(healthy, rng(0), True)
        assert (film(healthy + change) - film(healthy)).max() > 4


def test_devices_lie_where_they_belong():
    for patient in range(6):
        a, _ = chest(128, patient, True)
        for side in (-1, 1):
            tube = DEVICES["chest_tube"](a, rng(patient), side)[1]
            assert not tube[a.u * side < -0.02].any() and (tube & (a.cavity[side] > 0.5)).sum() > 5
            box = DEVICES["pacemaker"](a, rng(patient), side)[0] > 1.0
            assert (a.u[box] * side > 0).mean() > 0.8
        cava = DEVICES["central_line"](a, rng(patient), 1)[1]
        cava &= abs(a.u) < 0.12
        assert a.u[cava & (a.v > a.v[cava].max() - 0.03)].max() < 0  # the tip, right of the midline
        assert abs(a.u[DEVICES["sternal_wires"](a, rng(patient), 1)[1]].mean()) < 0.03


@pytest.mark.parametrize("style", STYLES)
def test_a_named_style_is_always_there_and_on_its_side(style):
    for k in range(40):
        image, masks = marks(np.full((128, 128), 80, np.float32), rng(k), k % 2 == 1, style)
        x = np.nonzero(masks["marker"])[1] / 128
        assert len(x) and (x.min() > 0.6 or x.max() < 0.4)
        assert image.dtype == np.float32 and (image[~np.any(list(masks.values()), 0)] == 80).all()


def test_borders_spare_what_is_to_be_kept():
    for k in range(60):
        image, mask = collimate(np.full((128, 128), 100, np.float32), rng(k), k % 2 == 1, keep=(0.05, 0.05, 0.95, 0.85))
        assert not mask[16:98, 14:114].any() and (image[~mask] == 100).all()


def measures(images):
    "Means, spreads, and slopes of the radial power spectrum (4 to 100 cycles) of images at 256 pixels."
    n, window = 256, np.outer(np.hanning(256), np.hanning(256))
    ring = np.hypot(*np.meshgrid(np.fft.fftfreq(n) * n, np.fft.fftfreq(n) * n)).astype(int).ravel()
    rows, k = [], np.arange(4, 100)
    for image in images:
        x = image.astype(np.float32) / 255
        power = np.abs(np.fft.fft2((x - x.mean()) * window)).ravel() ** 2
        radial = np.bincount(ring, power) / np.bincount(ring)
        rows.append((x.mean(), x.std(), np.polyfit(np.log(k), np.log(radial[k]), 1)[0], np.log10(radial[20:30].mean())))
    return np.array(rows)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images here")
def test_drawn_beside_real():
    pd = pytest.importorskip("pandas")
    view = pd.read_csv(REAL / "Data_Entry_2017_v2020.csv", index_col="Image Index")["View Position"]
    files = sorted((REAL / "images").iterdir())
    files = [files[i] for i in rng(0).permutation(len(files))[:80]]
    real = [reduced(cv2.imread(str(f), cv2.IMREAD_GRAYSCALE), 256) for f in files]
    drawn = [picture(256, 100 + k, view[f.stem + ".png"] == "AP") for k, f in enumerate(files)]
    a, b = measures(real), measures(drawn)
    print("mean, spread, slope, power at 20 to 30 cycles; real", np.median(a, 0).round(2), "drawn", np.median(b, 0).round(2))
    assert np.all(np.abs(np.median(a, 0) - np.median(b, 0)) < (0.1, 0.06, 0.4, 0.4))
    assert 0.6 < b[:, 0].std() / a[:, 0].std() < 1.6  # as various in brightness
