"What the notebook of `viz` cannot say: rendered pixels, sizes on hard images, tables with every kind of gap."

import io

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from cxr_book import viz as V
from cxr_book.core import FINDINGS, CxrError, reported


@pytest.fixture(autouse=True)
def close_figures():
    V.style()
    yield
    plt.close("all")


def canvas(width, height, dpi=50):
    "A figure of width x height pixels that one axes fills, and a function that renders it."
    plt.rcParams["figure.constrained_layout.use"] = False
    fig = plt.figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    ax = fig.add_axes((0, 0, 1, 1))

    def pixels():
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=dpi)
        buffer.seek(0)
        return plt.imread(buffer)[..., :3]  # (H, W, 3)

    return ax, pixels


def like(pixels, color, tolerance=0.15):
    return np.abs(pixels - np.array(to_rgb(color))).max(-1) < tolerance


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize("shape", [(100, 100), (200, 200), (50, 25), (1024, 1024), (17, 33)])
@pytest.mark.parametrize("box", [(0.25, 0.1, 0.75, 0.3), (0.1, 0.5, 0.2, 0.9)])
def test_a_box_lands_on_its_pixels_whatever_the_images_size(shape, box):
    h, w = shape
    width, height = 400, 400 * h // w
    ax, pixels = canvas(width, height)
    V.show_boxes(V.show_image(ax, np.zeros(shape, np.uint8)), box, linewidth=2)  # 1.4 pixels at 50 dpi
    rows, columns = np.nonzero(like(pixels(), V.TRUTH, 0.4))
    assert abs(columns.min() - box[0] * width) <= 2 and abs(columns.max() + 1 - box[2] * width) <= 2
    assert abs(rows.min() - box[1] * height) <= 2 and abs(rows.max() + 1 - box[3] * height) <= 2
    inside = like(pixels(), V.TRUTH, 0.4)[int((box[1] + box[3]) / 2 * height), int((box[0] + box[2]) / 2 * width)]
    assert not inside  # an outline, not a block


def test_truth_is_green_and_prediction_is_red():
    two = [(0.5, 0.5, 0.9, 0.9), (0.2, 0.6, 0.3, 0.7)]
    fig = V.show_panel(np.zeros((64, 64)), np.zeros((8, 8)), [(0.1, 0.1, 0.4, 0.4)], two)
    image, overlay, boxes = fig.axes
    assert not image.patches and not overlay.patches
    assert [to_rgb(p.get_edgecolor()) for p in boxes.patches] == [to_rgb(V.TRUTH)] + 2 * [to_rgb(V.PREDICTION)]
    green, red = to_rgb(V.TRUTH), to_rgb(V.PREDICTION)
    assert green[1] > 2 * max(green[0], green[2]) - 0.1 and red[0] > 2 * max(red[1], red[2])
    assert [p.get_bbox().bounds for p in boxes.patches][1] == pytest.approx((0.5, 0.5, 0.4, 0.4))


# ---------------------------------------------------------------- images and heat maps


def test_an_asymmetric_image_is_neither_flipped_nor_transposed():
    image = np.zeros((40, 80), np.uint8)
    image[:10, :10] = 255  # upper left
    ax, pixels = canvas(160, 80)
    V.show_image(ax, image)
    shown = pixels()[..., 0]
    assert shown[10, 10] == 1 and shown[10, 150] == shown[70, 10] == shown[70, 150] == 0


@pytest.mark.parametrize("place", [(1, 6), (6, 1), (0, 0), (7, 7)])
def test_the_maximum_is_the_hot_end_and_lies_over_its_cell(place):
    heat = np.full((8, 8), 0.05)
    heat[place] = 1.0
    ax, pixels = canvas(160, 160)
    V.show_heat(V.show_image(ax, np.full((32, 32), 90, np.uint8)), torch.tensor(heat), alpha=1.0)
    shown = pixels()
    row, column = np.array(place) * 20 + 10
    scale = plt.get_cmap(V.HEAT)(np.linspace(0, 1, 101))[:, :3]
    assert np.abs(scale - shown[row, column]).sum(1).argmin() > 90  # the hot end (between cells it is interpolated)
    light = shown.sum(-1)
    assert np.abs(np.argwhere(light > light.max() - 0.02).mean(0) - (row, column)).max() < 10  # within its cell
    far = np.array([150 if p < 4 else 10 for p in place])
    assert np.allclose(shown[tuple(far)], 90 / 255, atol=0.06)  # where nothing is, the image stays visible


def test_the_same_heat_has_the_same_colour_in_every_panel():
    ax, pixels = canvas(40, 40)
    V.show_heat(V.show_image(ax, np.zeros((8, 8))), np.full((4, 4), 0.3), alpha=1 / 0.3)  # opaque
    assert np.allclose(pixels()[20, 20], plt.get_cmap(V.HEAT)(0.3)[:3], atol=0.02)


@pytest.mark.parametrize("shape, value", [((2, 4, 4), 1.0), ((4, 4), 2.0), ((4, 4), -1.0), ((4, 4), np.nan)])
def test_no_raw_map_passes_for_a_heat_map(shape, value):
    heat = np.full(shape, value)
    _, ax = plt.subplots()
    with pytest.raises(CxrError, match="heat"):
        V.show_heat(V.show_image(ax, np.zeros((8, 8))), heat)


def test_tensors_arrays_and_half_precision_are_welcome():
    _, ax = plt.subplots()
    whole = torch.zeros(8, 8, dtype=torch.uint8)
    for image in (torch.rand(1, 8, 8), torch.rand(1, 1, 8, 8).bfloat16(), whole, whole.numpy()):
        V.show_image(ax, image)
    V.show_heat(ax, torch.rand(4, 4, requires_grad=True))


def test_masks_are_outlined_where_they_are_also_at_the_border():
    mask = np.zeros((50, 100), bool)
    mask[10:20, :30] = True
    fig = V.show_masks(np.zeros((50, 100)), {"left_lung": mask, "heart": np.zeros((5, 5))})
    (path,) = fig.axes[0].collections[0].get_paths()
    assert path.vertices.min(0) == pytest.approx((0.0, 0.2), abs=0.01)
    assert path.vertices.max(0) == pytest.approx((0.3, 0.4), abs=0.01)
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ["left lung", "heart"]


# ---------------------------------------------------------------- sizes


def test_figures_of_images_fit_into_the_limit():
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024), dtype=np.uint8)
    heat = np.random.default_rng(1).random((16, 16))
    panel = V.Panel(noise, heat, (0.2, 0.2, 0.5, 0.5), (0.3, 0.3, 0.6, 0.6), "Mass  0.50")
    batch = V.show_batch(noise[None, None] / 255)
    for fig in (V.show_panel(*panel), V.show_panels([panel] * 4), V.show_gallery([panel] * 8), batch):
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", bbox_inches="tight", dpi=fig.dpi)  # as a notebook does
        assert buffer.tell() <= V.LIMIT
        plt.close(fig)


def test_an_empty_batch_and_a_gallery_of_one():
    assert len(V.show_gallery([V.Panel(np.zeros((4, 4)))]).axes) == 4
    assert V.show_batch(torch.rand(2, 1, 8, 8), torch.zeros(2, 14)).axes[0].get_title() == "no finding"


# ---------------------------------------------------------------- curves and bars


def test_roc_refuses_shapes_that_do_not_fit_and_draws_no_absent_class():
    with pytest.raises(CxrError, match="fit together"):
        V.show_roc(np.zeros((5, 14)), np.zeros((5, 13)))
    y = np.zeros((6, 14), int)
    y[:3, 0] = 1
    fig = V.show_roc(y, np.random.default_rng(0).random((6, 14)))
    texts = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert texts[0].endswith("Atelectasis") and all(t.startswith("—") for t in texts[1:]) and len(texts) == 14


def test_roc_marks_the_operating_points_that_there_are():
    y, scores = np.tile([[0], [0], [1], [1]], (1, 14)), np.tile([[0.1], [0.4], [0.3], [0.9]], (1, 14))
    fig = V.show_roc(y, scores, thresholds=np.r_[0.35, np.full(13, np.nan)])
    marks = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in marks] == [(0.5, 0.5)]


def test_losses_with_gaps_and_one_stage():
    lines = [dict(stage="a", train_loss=1.0, valid_loss=None), dict(stage="a", train_loss=0.5, valid_loss=0.7)]
    fig = V.show_losses(lines)
    assert len(fig.axes) == 1 and len(fig.axes[0].lines) == 2  # no border is drawn for a single stage


def test_bars_show_the_interval_and_leave_gaps():
    ours = pd.DataFrame(dict(value=[0.5, 0.4], low=[0.3, 0.4], high=[0.6, 0.4]), index=["Nodule", "Mass"])
    fig = V.show_bars({"ours": ours, "blob": {"Nodule": 0.1}}, "IoU")
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["Mass", "Nodule"]
    segments = ax.collections[0].get_segments()
    assert [s[:, 1].tolist() for s in segments] == [pytest.approx([0.4, 0.4]), pytest.approx([0.3, 0.6])]
    assert np.isnan(ax.patches[2].get_height())
    with pytest.raises(CxrError, match="value"):
        V.show_bars({"ours": pd.DataFrame(dict(mean=[1.0]))})


def test_bars_of_costs_stand_by_group_and_form():
    names = [(group, form) for group in ("frozen body", "all") for form in ("z", "y", "x")]
    costs = pd.DataFrame(names, columns=["what", "form"])
    costs = costs.assign(bytes=np.arange(1, 7) * 2**20, seconds=np.arange(6) / 10)
    _, axes = plt.subplots(1, 2)
    assert V.show_costs(axes, costs.iloc[[2, 0, 1, 3, 5, 4]], "what", ["z", "y", "x"]) is axes
    for ax, values, label in zip(axes, (range(1, 7), costs.seconds), ("peak MB", "seconds")):
        bars = sorted(ax.patches, key=lambda bar: bar.get_x())  # from left to right: group by group, form by form
        assert [bar.get_height() for bar in bars] == pytest.approx([*values]) and ax.get_ylabel() == label
        assert all(a.get_x() + a.get_width() < b.get_x() for a, b in zip(bars, bars[1:]))
        assert len({bar.get_facecolor() for bar in bars[:3]}) == 3 and len(ax.texts) == 6
        assert [bar.get_facecolor() for bar in bars[:3]] == [bar.get_facecolor() for bar in bars[3:]]
        assert [t.get_text() for t in ax.get_xticklabels()] == ["frozen\nbody", "all"]
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["z", "y", "x"] and axes[1].get_legend() is None

    _, axes = plt.subplots(1, 2)
    V.show_costs(axes, costs, "what", ["y", "z"])
    assert [bar.get_height() for bar in axes[0].patches] == [2, 5, 1, 4]
    assert [to_rgb(bar.get_facecolor()) for bar in axes[0].patches[::2]] == [to_rgb("C1"), to_rgb("C0")]
    for bad, match in ((dict(rows="whet"), "what"), (dict(rows="what", forms=["w"]), "known: z, y, x")):
        with pytest.raises(CxrError, match=match):
            V.show_costs(axes, costs, **bad)


# ---------------------------------------------------------------- tables


def cells(markdown):
    lines = [line for line in str(markdown).splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]


column = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=14, max_size=14)


@settings(max_examples=30, deadline=None)
@given(column, column)
def test_the_comparison_says_what_the_numbers_say(a, b):
    paper, ours = pd.Series(a, FINDINGS, dtype=float), pd.Series(b, FINDINGS, dtype=float)
    head, _, *rows = cells(V.comparison_table(paper.sample(frac=1, random_state=0), ours))
    assert head == ["finding", "paper", "ours", "difference"]
    assert [r[0] for r in rows] == [f.replace("_", " ") for f in FINDINGS]
    for (_, p, o, d), x, y in zip(rows, a, b):
        assert p.strip("*") == ("—" if x is None else f"{x:.3f}")
        assert o.strip("*") == ("—" if y is None else f"{y:.3f}")
        assert d == ("—" if x is None or y is None else f"{y - x:+.3f}")
        known = [v for v in (x, y) if v is not None]
        for cell, v in ((p, x), (o, y)):
            assert cell.startswith("**") == (v is not None and round(v, 3) == max(round(k, 3) for k in known))


def test_intervals_means_footnotes_and_several_papers():
    ours = pd.DataFrame(dict(value=[0.25, 0.5], low=[0.2, np.nan], high=[0.3, np.nan]), index=["Mass", "Mean"])
    papers = {"authors": pd.Series({"Mass": 0.3, "Mean": 0.4}), "rerun": pd.Series({"Mass": 0.2})}
    t = V.comparison_table(papers, ours, against="rerun", notes={"rerun": "by others", "Mean": "of two"})
    assert cells(t) == [
        ["finding", "authors", "rerun¹", "ours", "difference"], ["---", "---:", "---:", "---:", "---:"],
        ["Mass", "**0.300**", "0.200", "0.250 [0.200, 0.300]", "+0.050"], ["Mean²", "0.400", "—", "**0.500**", "—"],
    ]  # fmt: skip
    assert t.endswith("\n\n¹ by others\n\n² of two") and t._repr_markdown_() == str(t) == repr(t)
    assert "**0.200**" in V.comparison_table(papers, ours, best="min")
    assert "**" not in V.comparison_table(papers, ours, best=None)
    with pytest.raises(CxrError, match="rerun"):
        V.comparison_table(papers, ours, notes={"rerum": "?"})


def test_every_reported_table_can_be_taken_apart():
    found = 0
    for paper, tables in {"001": 4, "002": 3, "003": 1, "004": 3}.items():
        for n in range(1, tables + 1):
            long = reported(paper, n)
            for (method, setting, metric), part in long.groupby(["method", "setting", "metric"], dropna=False):
                where = dict(method=method, setting=setting, metric=metric)
                assert len(V.paper_column(long, **where)) == len(part)
                found += 1
    assert found > 30


def test_cells_of_all_kinds():
    columns = {"x": [1, 1234567], "y": ["a|b", None], "z": [np.inf, -0.12345], "ok": [True, False]}
    frame = pd.DataFrame(columns, index=["r_1", "r_2"])
    assert "| r 1 | 1 | a\\|b | — | True |" in V.table(frame)
    assert "| r 2 | 1,234,567 | — | -0.123 | False |" in V.table(frame)
    with pytest.raises(CxrError, match="settings"):
        V.table(frame, notes={"settings": "?"})
