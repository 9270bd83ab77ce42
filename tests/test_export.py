"What the notebook of `export` cannot say: every method of the book, damaged and foreign files, and what a file gives away."

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cxr_book import export, guided
from cxr_book.catalogue import CHAPTERS, Trained
from cxr_book.core import FINDINGS, CxrError, digest, write_json
from cxr_book.evaluation import predict
from cxr_book.export import (
    WARNING,
    Card,
    as_notes,
    card_of,
    disagreement,
    export_onnx,
    from_notes,
    load_onnx,
    written_down,
)
from cxr_book.layers import Output, save_weights
from cxr_book.localization import BoxRule

torch.set_num_threads(1)
# a ResNet in place of the DenseNet, which chapter 10 exports
SMALL = dict(body="small-resnet", segmentation=dict(image_size=64, width=4, depth=2, bce=0.0))
METHODS = {
    "10_baselines": ({}, ("dcnn", "chexnet")),
    "11_equivariant": ({}, ("small-resnet4", "multires-small-resnet4", "multires-small-resnet4-pcm")),
    "12_proposals": (dict(pyramid=8), ("sal", "det", "mix")),
    "13_limited": (dict(window=3), ("unary", "crf")),
    "14_weighting": (
        SMALL,
        ("weighted", "attention", "chexnet", "dcnn", "dcnn-attention", "attention-inside", "weighted-inside", "senet", "agcnn"),
    ),
}
ALL = [(chapter, name) for chapter, (_, names) in METHODS.items() for name in names]


@pytest.fixture(scope="module", autouse=True)
def operators():
    "The exporter compiles its table of operators for each file anew; once is enough for all of these."
    from torch.onnx._internal.exporter import _registration

    patch, table = pytest.MonkeyPatch(), []
    original = _registration.ONNXRegistry.from_torchlib.__func__

    def once(cls, *args, **kwargs):
        if not table:
            table.append(original(cls, *args, **kwargs))
        return table[0]

    patch.setattr(_registration.ONNXRegistry, "from_torchlib", classmethod(once))
    yield
    patch.undo()


def at_random(net, seed=0):
    "Statistics and weights of a network that are nobody's, but not those of a new one."
    rng = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=rng) / 10)
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=rng) + 0.5)
            m.weight.data.copy_(torch.rand(m.weight.shape, generator=rng) + 0.5)
            m.bias.data.copy_(torch.randn(m.bias.shape, generator=rng) / 10)
    if getattr(net, "segmenter", None):  # about half of the pixels are lungs or heart
        with torch.no_grad():
            z = net.segmenter.eval()(torch.rand(2, 1, 64, 64, generator=rng))
            net.segmenter.net.out.bias -= z.amax(1).median()
    if hasattr(net, "regions"):  # regions that differ, and move
        net.regions.score.weight.data *= 30
        net.regions.delta.weight.data.normal_(0, 0.3, generator=rng)
    return net.eval()


def pretend(folder, chapter="10_baselines", name="dcnn", **changes):
    "A trained method with weights and scores that nobody made."
    s = CHAPTERS[chapter].settings.from_preset("smoke", **(METHODS[chapter][0] | changes))
    build = CHAPTERS[chapter].methods(s)[name]
    torch.manual_seed(0)
    save_weights(at_random(build()), folder / name / "weights.safetensors")
    rng = np.random.default_rng(0)
    result = dict(
        rule=BoxRule(rule="contours", threshold=0.7).model_dump(),
        modes=dict(validated=dict(thresholds={f: "otsu" if f == "Hernia" else float(rng.random()) for f in FINDINGS})),
        operating={f: None if f == "Mass" else float(rng.normal()) for f in FINDINGS},
    )
    write_json(folder / "metrics.json", {name: result})
    return Trained(name, chapter, folder, folder / name, s, name, build)


class Tiny(nn.Module):
    "A method that is exported in no time."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 14, 3)

    def forward(self, x):
        maps = self.conv(x)
        return Output(maps.mean((2, 3)), maps)


class Instead:
    "A trained method, with another network."

    def __init__(self, trained, method):
        self.trained, self.method = trained, method

    def __getattr__(self, key):
        return getattr(self.trained, key)

    def load(self):
        return self.method.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return pretend(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    return export_onnx(trained, tmp_path_factory.mktemp("out") / "dcnn.onnx")


def test_every_method_of_the_catalogue_is_here():
    for chapter, (changes, names) in METHODS.items():
        s = CHAPTERS[chapter].settings.from_preset("smoke", **changes)
        assert tuple(CHAPTERS[chapter].methods(s)) == names


@pytest.mark.slow
@pytest.mark.parametrize("chapter, name", ALL)
def test_every_method_gives_the_same_output(chapter, name, tmp_path):
    trained = pretend(tmp_path, chapter, name)
    there, here = load_onnx(export_onnx(trained, tmp_path / "a.onnx")), trained.load()
    images = torch.rand(5, 1, 64, 64, generator=torch.Generator().manual_seed(7))
    apart = disagreement(here, there, images, (1, 2, 5))  # no size that the exporter has seen alone
    assert max(apart.values()) <= 1e-4
    assert there(images).maps.std() > 1e-4  # or everything agrees
    if name in ("weighted", "weighted-inside", "attention-inside"):
        assert 0.2 < here(images).extras["organs"].mean() < 0.8
    if name == "agcnn":
        assert len(here(images).extras["box"].unique(dim=0)) > 1
    text = (tmp_path / "a.onnx").read_bytes()
    assert b"site-packages" not in text and not re.search(rb"File |cxr_book/|\.py\b", text)


@pytest.mark.slow
def test_the_same_output_at_the_size_of_the_paper(tmp_path):
    "A ResNet-50 that nobody trained has maps of up to 100; float32 is the limit, not the file."
    s = CHAPTERS["10_baselines"].settings.from_preset("paper", weights=None)
    torch.manual_seed(0)
    method = CHAPTERS["10_baselines"].methods(s)["dcnn"]().eval()
    card = card_of(pretend(tmp_path)).but(image_size=s.image_size, input=s.still)
    (tmp_path / "a.onnx").write_bytes(export.to_onnx(method, card.side, as_notes(card)).SerializeToString())
    images = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    assert max(disagreement(method, load_onnx(tmp_path / "a.onnx"), images, (1, 2)).values()) <= 1e-4
    with torch.no_grad():
        assert method(images).maps.abs().max() > 50


def test_the_crop_of_the_guided_network_follows_the_attention():
    "Boxes by tensor operations are those by OpenCV on maps of all sizes, ties and empty maps among them."
    rng = torch.Generator().manual_seed(3)
    for size in ((1, 1), (1, 6), (2, 2), (4, 4), (7, 7), (8, 8), (3, 10)):
        heat = (torch.rand(200, *size, generator=rng) * 4).round() / 4  # many ties
        heat[:3] = torch.tensor([0.0, 1.0, 0.7])[:, None, None]
        for threshold in (0.0, 0.7, 1.0):
            asked = guided.attention_box(heat, threshold, 0.2)
            assert torch.allclose(export.attention_box(heat, threshold, 0.2), asked, rtol=0, atol=1e-6)


def test_nothing_stays_changed():
    method, box = Tiny().train(), guided.attention_box
    before = {k: v.clone() for k, v in method.state_dict().items()}
    export.to_onnx(method, 64)
    assert method.training
    assert guided.attention_box is box and "len" not in vars(export.regions) and "len" not in vars(export.crf)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert all(p.requires_grad for p in method.parameters())
    with pytest.raises(KeyError), written_down():
        raise KeyError
    assert guided.attention_box is box


# --- the card


def test_the_card_comes_back(trained, file):
    there = load_onnx(file)
    for key in ("name", "chapter", "title", "rule", "input_augment"):
        assert getattr(there, key) == getattr(trained, key)
    for key in ("thresholds", "operating"):
        assert np.array_equal(getattr(there, key), getattr(trained, key), equal_nan=True)
        assert np.isnan(getattr(there, key)).sum() == 1
    assert there.settings.image_size == 64 and there.settings.still == trained.settings.still
    assert there.card.settings == digest(trained.settings.model_dump(mode="json"))
    assert there.load() is there
    notes = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert notes["warning"] == WARNING and WARNING.startswith("Not a medical device")
    assert tuple(json.loads(notes["findings"])) == FINDINGS
    assert notes["method"] == "dcnn" and notes["code"]


def test_the_side_is_what_the_loader_gives(tmp_path):
    trained = pretend(tmp_path, augment=dict(centre_crop=0.75, flip=0.5))
    card = card_of(trained)
    assert (card.image_size, card.side, card.input.flip) == (64, 48, 0)
    there = load_onnx(export_onnx(Instead(trained, Tiny()), tmp_path / "a.onnx"))
    assert there(torch.rand(1, 1, 48, 48)).logits.shape == (1, 14)
    with pytest.raises(CxrError, match=r"\(B, 1, 48, 48\)"):
        there(torch.rand(1, 1, 64, 64))
    assert card.but(input=dict(out_size=56)).side == 56


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(findings=json.dumps(FINDINGS[1:])), "the order of this book"),
        (dict(thresholds="[0.5]"), "thresholds"),
        (dict(rule='{"rule": "biggest"}'), "rule"),
        (dict(image_size="many"), "no JSON"),
        (dict(chapter=None), "chapter"),
    ],
)
def test_a_card_that_is_wrong(trained, change, says):
    notes = {k: v for k, v in (as_notes(card_of(trained)) | change).items() if v is not None}
    with pytest.raises(CxrError, match=says):
        from_notes(notes)


def test_the_card_has_no_folder_in_it(trained):
    notes = as_notes(card_of(trained))
    assert set(notes) == set(Card.model_fields)
    assert str(trained.run) not in "".join(notes.values())


# --- what is kept


@pytest.fixture
def given(trained, file, monkeypatch):
    "Export with the file of `trained`, but with another method to compare it with."

    monkeypatch.setattr(export, "to_onnx", lambda *args: onnx.load(file))
    return lambda method, path, images=None: export_onnx(Instead(trained, method), path, images)


class Changed(nn.Module):
    "A method, of which some answers are others."

    def __init__(self, method, change):
        super().__init__()
        self.method, self.change = method, change

    def forward(self, x):
        return Output(*self.change(x, *self.method(x)[:2]))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, logits, maps: (logits + 2e-4, maps),
        lambda x, logits, maps: (logits, maps - 2e-4),
        lambda x, logits, maps: (logits, maps * torch.nan),
        lambda x, logits, maps: (logits, maps[..., :-1]),
        lambda x, logits, maps: (logits + (len(x) == 3), maps),  # in batches of three only
    ],
)
def test_a_difference_leaves_no_file(trained, given, tmp_path, change):
    with pytest.raises(CxrError, match="not written.* 4 images"):
        given(Changed(trained.load(), change), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_difference_leaves_the_old_file(trained, given, tmp_path):
    (tmp_path / "a.onnx").write_text("old")
    with pytest.raises(CxrError):
        given(Changed(trained.load(), lambda x, logits, maps: (logits + 1, maps)), tmp_path / "a.onnx")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    given(Changed(trained.load(), lambda x, logits, maps: (logits + 2e-5, maps)), tmp_path / "a.onnx")
    assert load_onnx(tmp_path / "a.onnx").name == "dcnn"


def test_a_given_image_on_which_it_differs_counts(trained, given, tmp_path):
    def if_black(x, logits, maps):
        return logits + 1.0 * (x.amax((1, 2, 3)) == 0)[:, None], maps

    on_black = Changed(trained.load(), if_black)
    given(on_black, tmp_path / "noise.onnx")
    with pytest.raises(CxrError, match="not written.* 6 images"):
        given(on_black, tmp_path / "a.onnx", np.zeros((2, 1, 64, 64), np.float32))
    with pytest.raises(CxrError, match=r"expected \(n, 1, 64, 64\)"):
        given(trained.load(), tmp_path / "a.onnx", torch.zeros(2, 1, 32, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["noise.onnx"]


class Sly(nn.Module):
    def forward(self, x):
        return Output(x.mean((2, 3)), x if x.sum() > 3 else -x)  # depends on numbers that the exporter does not have


class Frozen(nn.Module):
    def forward(self, x):
        return Output(x.mean((2, 3)).view(len(x), 1), x)  # an integer, so a constant


@pytest.mark.parametrize("method, says", [(Sly(), "Sly cannot be written as ONNX"), (Frozen(), "batch")])
def test_a_method_that_cannot_be_written(method, says):
    with pytest.raises(CxrError, match=says):
        export.to_onnx(method, 32)


# --- files of others


def test_arrays_and_tensors(trained, file):
    there, x = load_onnx(file, threads=1), torch.rand(3, 1, 64, 64)
    one, two = there(x), there(x.numpy())
    assert torch.equal(one.logits, two.logits) and one.maps.shape[:2] == (3, 14)
    assert torch.equal(there(x.double()).logits, one.logits)
    flipped = there(x.flip(3)).logits  # a view with other strides
    assert torch.equal(flipped, there(x.flip(3).contiguous()).logits)
    for bad in (x[:, 0], x.repeat(1, 3, 1, 1), x[:0], (x * 255).to(torch.uint8)):
        with pytest.raises(CxrError, match="expected floats"):
            there(bad)


def test_it_predicts_like_any_method(trained, file):
    class Batch:
        def __init__(self, x, rows):
            self.x, self.rows, self.affine = x, torch.tensor(rows), torch.eye(3).expand(len(rows), 3, 3)

    class Images:
        rows = np.arange(4)

        def epoch(self, n):
            x = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
            yield from (Batch(x[i : i + 3], list(range(4))[i : i + 3]) for i in (0, 3))

    a, b = predict(trained.load(), Images()), predict(load_onnx(file), Images())
    assert np.abs(a.logits - b.logits).max() < 1e-4 and np.abs(a.maps - b.maps).max() < 1e-4


def _external(model):
    t = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(t, "secret.bin")
    t.ClearField("raw_data")


def _elsewhere(model):
    del model.metadata_props[:]


def _renamed(model):
    model.graph.output[0].name = "scores"


@pytest.mark.parametrize(
    "spoil, says",
    [(_external, "another file"), (_elsewhere, "no method of this book"), (_renamed, "expected image, and logits")],
)
def test_files_that_are_not_ours(file, tmp_path, spoil, says):
    model = onnx.load(file)
    spoil(model)
    (tmp_path / "b.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CxrError, match=says):
        load_onnx(tmp_path / "b.onnx")


def test_damaged_files(file, tmp_path):
    "A clear error or a method, never another exception."
    data, rng = file.read_bytes(), np.random.default_rng(0)
    for i in range(30):
        spoilt = bytearray(data[: rng.integers(len(data))] if i % 3 == 0 else data)
        for at in rng.integers(0, max(1, min(len(spoilt), 4000)), 5 * (i % 3)):  # where the structure stands
            if spoilt:
                spoilt[at] = rng.integers(256)
        (tmp_path / "c.onnx").write_bytes(spoilt)
        try:
            load_onnx(tmp_path / "c.onnx", threads=1)
        except CxrError as e:
            assert "c.onnx" in str(e)
    for path in (tmp_path / "none.onnx", tmp_path, Path(__file__)):
        with pytest.raises(CxrError, match=re.escape(str(path))):
            load_onnx(path)


def test_the_same_method_gives_the_same_file(trained, tmp_path):
    method = Tiny()
    one, two = (export_onnx(Instead(trained, method), tmp_path / f"{n}.onnx").read_bytes() for n in "ab")
    assert one == two


def test_a_run_that_was_not_finished(trained, tmp_path):
    with pytest.raises(CxrError, match="not finished"):
        export_onnx(replace(trained, run=tmp_path), tmp_path / "a.onnx")
