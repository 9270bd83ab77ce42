"What the notebooks of `dicom` and `reading` cannot say: every kind of file against plain float64, and damaged ones."

import os
import random
import tracemalloc
from pathlib import Path

import cv2
import gdcm
import numpy as np
import pydicom
import pytest
from pydicom.pixels import set_pixel_data
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, generate_uid

from cxr_book.core import CxrError
from cxr_book.dicom import read_dicom, to_grey
from cxr_book.reading import find_pictures, kind_of, read_pictures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RNG = np.random.default_rng(5)


def dataset(pixels, photometric="MONOCHROME2", bits=None, **elements):
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.1.1", generate_uid(), "DX"
    set_pixel_data(ds, pixels, photometric, bits or 8 * pixels.dtype.itemsize)
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def save(path, *args, **elements):
    dataset(*args, **elements).save_as(path, enforce_file_format=True)
    return Path(path)


def transcode(source, path, syntax):
    "The same file in a compressed transfer syntax, by GDCM."
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return Path(path)


def film(dtype=np.uint16, low=0, high=4096, shape=(24, 31)):
    return RNG.integers(low, high, shape).astype(dtype)


def plain(pixels, bits, slope=1.0, intercept=0.0, window=None, inverted=False):
    "The chain of PS3.3 C.11, pixel by pixel in float64, written as the standard has it."
    v = pixels.astype(np.float64) * slope + intercept
    if window:
        centre, width, function = window
        g = np.zeros(v.shape)
        for at in np.ndindex(v.shape):
            x = v[at]
            if function == "SIGMOID":
                g[at] = 1 / (1 + np.exp(-4 * (x - centre) / width))
                continue
            c, w = (centre - 0.5, width - 1) if function == "LINEAR" else (centre, width)
            g[at] = 0 if x <= c - w / 2 else 1 if x > c + w / 2 else (x - c) / w + 0.5
    elif bits <= 8 and pixels.dtype.kind == "u" and (slope, intercept) == (1, 0):
        g = v / (2**bits - 1)
    else:
        low, high = np.percentile(v, (0.5, 99.5), method="inverted_cdf")
        g = np.clip((v - low) / (high - low), 0, 1)
    return np.rint(255 * (1 - g if inverted else g))


# --- the chain


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("kind", ["8", "6 of 8", "12", "signed 12", "16", "signed 16"])
@pytest.mark.parametrize("rescale", [None, (2.5, -1024.0), (-1.0, 50.0)])
def test_against_plain_float64(tmp_path, photometric, kind, rescale):
    signed, bits = "signed" in kind, int(kind.split()[0 if kind[0].isdigit() else 1])
    dtype = np.dtype(("i" if signed else "u") + ("1" if bits <= 8 else "2"))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    pixels = film(dtype, low, high)
    slope, intercept = rescale or (1.0, 0.0)
    elements = dict(RescaleSlope=slope, RescaleIntercept=intercept) if rescale else {}
    middle = (low + high) / 2 * slope + intercept
    windows = [None] + [(middle + 3, 0.6 * (high - low) + 1, f) for f in ("LINEAR", "LINEAR_EXACT", "SIGMOID")]
    for i, window in enumerate(windows):
        shown = {}
        if window:
            shown = dict(WindowCenter=window[0], WindowWidth=window[1], VOILUTFunction=window[2])
        path = save(tmp_path / f"{i}.dcm", pixels, photometric, bits, **elements, **shown)
        (picture,) = read_dicom(path)
        expected = plain(pixels, bits, slope, intercept, window, photometric == "MONOCHROME1")
        assert picture.pixels.dtype == np.uint8
        assert np.abs(picture.pixels - expected).max() <= (1 if window and window[2] == "SIGMOID" else 0)


def natively(path, pixels, syntax):
    ds = dataset(pixels, bits=12, WindowCenter=0, WindowWidth=3000)
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = pixels.astype(">i2").tobytes()
        ds["PixelData"].VR = "OW"
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)
    return path


COMPRESSED = ["JPEGLSLossless", "JPEG2000Lossless", "JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "RLELossless"]
SYNTAXES = [*COMPRESSED, "JPEG2000", "DeflatedExplicitVRLittleEndian", "ImplicitVRLittleEndian", "ExplicitVRBigEndian"]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_transfer_syntaxes(tmp_path, syntax):
    pixels = film(np.int16, -2048, 2048)
    expected = plain(pixels, 12, window=(0, 3000, "LINEAR"))
    path = save(tmp_path / "a.dcm", pixels, bits=12, WindowCenter=0, WindowWidth=3000)
    if syntax == "ImplicitVRLittleEndian":
        path = natively(tmp_path / "b.dcm", pixels, ImplicitVRLittleEndian)
    elif syntax == "ExplicitVRBigEndian":
        path = natively(tmp_path / "b.dcm", pixels, ExplicitVRBigEndian)
    else:
        path = transcode(path, tmp_path / "b.dcm", syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.keyword.startswith(syntax[:8])
    for read in (read_dicom, read_pictures):  # here, and in a child process
        (picture,) = read(path)
        assert np.array_equal(picture.pixels, expected), syntax


def test_jpeg_of_eight_bits(tmp_path):
    smooth = cv2.resize(film(np.uint8, 0, 256, (4, 5)), (50, 40), interpolation=cv2.INTER_CUBIC)
    path = transcode(save(tmp_path / "a.dcm", smooth), tmp_path / "b.dcm", "JPEGBaselineProcess1")
    (picture,) = read_pictures(path)
    assert np.abs(picture.pixels.astype(int) - smooth).mean() < 3


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big"])
def test_without_preamble(tmp_path, syntax):
    pixels = film(np.int16, -2048, 2048)
    syntaxes = dict(implicit=ImplicitVRLittleEndian, big=ExplicitVRBigEndian)
    path = tmp_path / "a"
    if syntax in syntaxes:
        natively(path, pixels, syntaxes[syntax])
    else:
        save(path, pixels, bits=12, WindowCenter=0, WindowWidth=3000)
    data = path.read_bytes()
    for start in (132, 144 + int.from_bytes(data[140:144], "little")):  # with and without the meta header
        path.write_bytes(data[start:])
        assert kind_of(path) == "DICOM"
        (picture,) = read_pictures(path)
        assert np.array_equal(picture.pixels, plain(pixels, 12, window=(0, 3000, "LINEAR")))


# --- tables, padding, odd bits, colours, floats


def table(first, entries, bits):
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", [int(v) for v in entries])
    return item


def test_lookup_tables(tmp_path):
    pixels = film(high=1024)
    eight = np.arange(900) * 255 // 899  # more entries than a byte can count
    voi = dataset(pixels, bits=10, VOILUTSequence=Sequence([table(50, eight, 8)]), WindowCenter=5, WindowWidth=2)
    (voi.file_meta).TransferSyntaxUID = "1.2.840.10008.1.2.1"
    voi.save_as(tmp_path / "voi.dcm", enforce_file_format=True)
    (picture,) = read_dicom(tmp_path / "voi.dcm")
    assert np.array_equal(picture.pixels, eight[np.clip(pixels.astype(int) - 50, 0, 899)])
    modality = table(0, 3 * np.arange(1024), 16)
    modality.ModalityLUTType = "US"
    ds = dataset(pixels, bits=10, ModalityLUTSequence=Sequence([modality]), WindowCenter=1500, WindowWidth=3000)
    ds.save_as(tmp_path / "modality.dcm", enforce_file_format=True)
    (picture,) = read_dicom(tmp_path / "modality.dcm")
    assert np.array_equal(picture.pixels, plain(pixels, 10, 3.0, 0.0, (1500, 3000, "LINEAR")))


def test_the_first_of_several_windows(tmp_path):
    pixels = film()
    path = save(tmp_path / "a.dcm", pixels, bits=12, WindowCenter=[2000, 100], WindowWidth=[1000, 5])
    (picture,) = read_dicom(path)
    assert np.array_equal(picture.pixels, plain(pixels, 12, window=(2000, 1000, "LINEAR")))


def test_an_impossible_window_is_none(tmp_path):
    pixels = film()
    (picture,) = read_dicom(save(tmp_path / "a.dcm", pixels, bits=12, WindowCenter=2000, WindowWidth=0))
    assert np.array_equal(picture.pixels, plain(pixels, 12))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_range(tmp_path, photometric):
    pixels = film(low=1000, high=1100)
    pixels[:, :12] = 4095
    path = save(tmp_path / "a.dcm", pixels, photometric, 12, PixelPaddingValue=4000, PixelPaddingRangeLimit=4095)
    (picture,) = read_dicom(path)
    inside = plain(pixels[:, 12:], 12, inverted=photometric == "MONOCHROME1")
    assert (picture.pixels[:, :12] == 0).all() and np.array_equal(picture.pixels[:, 12:], inside)
    signed = film(np.int16, -500, 500)
    signed[0] = -2000
    ds = pydicom.Dataset()
    ds.PhotometricInterpretation, ds.BitsStored, ds.PixelRepresentation = photometric, 16, 1
    ds.add_new("PixelPaddingValue", "US", 65536 - 2000)  # written without its sign
    assert (to_grey(signed, ds)[0] == 0).all() and (to_grey(signed, ds)[1:] > 0).mean() > 0.9


def test_bits_that_are_not_used(tmp_path):
    pixels = film(high=4096)
    junk = save(tmp_path / "junk.dcm", pixels | np.uint16(0xA000), WindowCenter=2048, WindowWidth=4096)
    ds = pydicom.dcmread(junk)
    ds.BitsStored, ds.HighBit = 12, 11
    ds.save_as(junk)
    left = save(tmp_path / "left.dcm", pixels << 4 | np.uint16(7), WindowCenter=2048, WindowWidth=4096)
    ds = pydicom.dcmread(left)
    ds.BitsStored, ds.HighBit = 12, 15
    ds.save_as(left)
    expected = plain(pixels, 12, window=(2048, 4096, "LINEAR"))
    for path in (junk, left):
        (picture,) = read_dicom(path)
        assert np.array_equal(picture.pixels, expected), path.name


def test_colours(tmp_path):
    rgb = film(np.uint8, 0, 256, (20, 22, 3))
    luminance = rgb @ [0.299, 0.587, 0.114]
    (picture,) = read_dicom(save(tmp_path / "rgb.dcm", rgb, "RGB"))
    assert np.abs(picture.pixels - luminance).max() <= 1
    ybr = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    (picture,) = read_dicom(save(tmp_path / "ybr.dcm", np.ascontiguousarray(ybr), "YBR_FULL"))
    assert np.abs(picture.pixels - luminance).max() <= 3
    pixels, tables = film(np.uint8, 0, 256), RNG.integers(0, 256, (3, 256))
    ds = dataset(pixels, "PALETTE COLOR")
    for name, entries in zip(("Red", "Green", "Blue"), tables):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        ds.add_new(f"{name}PaletteColorLookupTableData", "OW", (257 * entries).astype("<u2").tobytes())
    ds.save_as(tmp_path / "palette.dcm", enforce_file_format=True)
    (picture,) = read_dicom(tmp_path / "palette.dcm")
    assert np.abs(picture.pixels - tables.T[pixels] @ [0.299, 0.587, 0.114]).max() <= 1


def test_floats(tmp_path):
    values = RNG.normal(0, 3, (20, 30)).astype(np.float32)
    ds = dataset(film(shape=values.shape))
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.BitsAllocated, ds.FloatPixelData = 32, values.tobytes()
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (picture,) = read_dicom(tmp_path / "a.dcm")
    assert np.array_equal(picture.pixels, plain(values, 32))
    values[0] = np.nan
    ds.FloatPixelData = values.tobytes()
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (picture,) = read_dicom(tmp_path / "a.dcm")
    assert (picture.pixels[0] == 0).all() and picture.pixels[1:].max() == 255


def group(centre, width):
    item, lut = pydicom.Dataset(), pydicom.Dataset()
    lut.WindowCenter, lut.WindowWidth = centre, width
    item.FrameVOILUTSequence = Sequence([lut])
    return item


def test_windows_of_frames(tmp_path):
    pixels = film(shape=(2, 9, 8))
    groups = Sequence([group(1000, 500), group(3000, 900)])
    path = save(tmp_path / "a.dcm", pixels, bits=12, PerFrameFunctionalGroupsSequence=groups)
    first, second = read_dicom(path)
    assert np.array_equal(first.pixels, plain(pixels[0], 12, window=(1000, 500, "LINEAR")))
    assert np.array_equal(second.pixels, plain(pixels[1], 12, window=(3000, 900, "LINEAR")))


def test_memory_does_not_grow_with_the_frames(tmp_path):
    path = save(tmp_path / "a.dcm", film(shape=(40, 300, 300)), bits=12)
    next(read_dicom(path))
    tracemalloc.start()
    n = sum(p.pixels.shape == (300, 300) for p in read_dicom(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 40 and peak < 4e6 < path.stat().st_size  # 7 MB of pixels


# --- what is no picture


def message(path, read=read_pictures):
    with pytest.raises(CxrError) as error:
        list(read(path))
    assert str(path) in str(error.value)
    return str(error.value)


def test_files_without_a_picture(tmp_path):
    ds = dataset(film())
    for name in ("PixelData", "Rows", "Columns"):
        delattr(ds, name)
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.88.11", "SR"
    ds.save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    assert "no picture" in message(tmp_path / "sr.dcm") and "SR" in message(tmp_path / "sr.dcm")
    ds.SOPClassUID, ds.EncapsulatedDocument = "1.2.840.10008.5.1.4.1.1.104.1", b"%PDF-1.4"
    ds.save_as(tmp_path / "pdf.dcm", enforce_file_format=True)
    assert "document" in message(tmp_path / "pdf.dcm")
    ds = dataset(film())
    del ds.PixelData
    ds.save_as(tmp_path / "bare.dcm", enforce_file_format=True)
    assert "cut off" in message(tmp_path / "bare.dcm")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.102", "1.2.3.4", "1.2.840.10008.1.2.4.201"])
def test_unknown_transfer_syntax(tmp_path, syntax):
    path = save(tmp_path / "a.dcm", film())
    data = path.read_bytes()
    old = b"1.2.840.10008.1.2.1\0"
    path.write_bytes(data.replace(b"UI\x14\0" + old, b"UI" + (len(syntax) + len(syntax) % 2).to_bytes(2, "little")
                                  + syntax.encode() + b"\0" * (len(syntax) % 2)))  # fmt: skip
    assert "gdcmconv" in message(path) or "damaged" in message(path)


def test_promises_that_cannot_be_kept(tmp_path):
    path = save(tmp_path / "a.dcm", film(shape=(100, 100)))
    ds = pydicom.dcmread(path)
    for name, changes in dict(huge=dict(Rows=60000, Columns=60000), more=dict(Rows=5000), none=dict(Rows=0)).items():
        for key, value in changes.items():
            setattr(ds, key, value)
        ds.save_as(tmp_path / f"{name}.dcm")
    tracemalloc.start()
    said = [message(tmp_path / f"{name}.dcm", read_dicom) for name in ("huge", "more", "none")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "60,000 x 60,000" in said[0] and "raise max_megapixels" in said[0] and peak < 5e6
    frames = save(tmp_path / "frames.dcm", film(shape=(3, 20, 20)))
    ds = pydicom.dcmread(frames)
    ds.NumberOfFrames = 10**9
    ds.save_as(frames)
    got = []
    with pytest.raises(CxrError):
        got += (p.frame for p in read_pictures(frames))
    assert len(got) <= 3


def test_notes(tmp_path):
    path = save(tmp_path / "a.dcm", film(), Modality="MG", BodyPartExamined="BREAST", ViewPosition="CC")
    (picture,) = read_pictures(path)
    assert len(picture.notes) == 3
    path = save(tmp_path / "b.dcm", film(), BodyPartExamined="CHEST", ViewPosition="PA")
    (picture,) = read_pictures(path)
    assert picture.notes == ()


def test_what_is_no_file(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, said in dict(empty="empty", pipe="no regular file", missing="no such file").items():
        assert said in message(tmp_path / name)
    assert "a folder" in message(tmp_path)
    assert find_pictures([tmp_path]) == ([], 2)
    assert message(Path("x" * 5000))


def test_a_folder_that_links_to_itself(tmp_path):
    (tmp_path / "a.dcm").write_bytes(save(tmp_path / "b", film()).read_bytes())
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "DICOMDIR").write_bytes((tmp_path / "b").read_bytes())
    assert [p.name for p in find_pictures([tmp_path, tmp_path / "b"]).files] == ["a.dcm", "b"]


# --- damage


def victims(folder):
    "Whole files of every kind."
    smooth = cv2.resize(film(np.uint16, 0, 4096, (6, 6)), (64, 48), interpolation=cv2.INTER_CUBIC).clip(0, 4095)
    native = save(folder / "native", smooth.astype(np.uint16), bits=12, WindowCenter=2000, WindowWidth=4000)
    eight = save(folder / "eight", (smooth // 16).astype(np.uint8))
    yield native
    for syntax in [*COMPRESSED, "DeflatedExplicitVRLittleEndian"]:
        yield transcode(native, folder / syntax, syntax)
    yield transcode(eight, folder / "jpeg", "JPEGBaselineProcess1")
    for ending, image in ((".png", smooth.astype(np.uint16)), (".jpg", (smooth // 16).astype(np.uint8))):
        (folder / ending[1:]).write_bytes(cv2.imencode(ending, image)[1].tobytes())
        yield folder / ending[1:]


def damage(data, rng):
    data = bytearray(data)
    if rng.random() < 0.3:
        return data[: rng.randrange(1, len(data))]
    start = rng.choice([0, 132, len(data) // 2])
    for _ in range(rng.choice([1, 3, 30])):
        data[rng.randrange(start, len(data))] = rng.randrange(256)
    return data


def test_damaged_files_are_errors_or_pictures(tmp_path, capfd):
    rng, outcomes = random.Random(8), {True: 0, False: 0}
    for whole in list(victims(tmp_path)):
        assert len(list(read_pictures(whole))) == 1, whole.name
        for i in range(20):
            broken = tmp_path / f"{whole.name}-{i}"
            broken.write_bytes(damage(whole.read_bytes(), rng))
            try:
                good = all(p.pixels.dtype == np.uint8 and p.pixels.ndim == 2 for p in read_pictures(broken))
                outcomes[good] += 1
                assert good
            except CxrError as e:
                assert str(e).startswith(str(broken)) and len(str(e)) < 600
                outcomes[False] += 1
    assert sum(outcomes.values()) == 200 and min(outcomes.values()) >= 20, outcomes
    assert "Traceback" not in capfd.readouterr().err
