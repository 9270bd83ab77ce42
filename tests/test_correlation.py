"What the notebook of `correlation` cannot say: random sizes, small blocks, other dtypes, and what it costs at size."

from functools import partial

import numpy as np
import pytest
import torch
from costs import assert_cheap

from cxr_book import correlation
from cxr_book.core import CxrError
from cxr_book.correlation import (
    PixelCorrelation,
    block_shape,
    correlate,
    correlate_plain,
    max_normalise,
    winner_only,
)
from cxr_book.measure import peak_memory

torch.set_num_threads(1)


def inputs(batch, channels, classes, h, w, dtype=torch.float32, seed=0):
    "An embedding, maps and a gradient."
    rng = torch.Generator().manual_seed(seed)
    embedding = torch.randn(batch, channels, h, w, generator=rng, dtype=torch.float64)
    maps, toward = (torch.rand(batch, classes, h, w, generator=rng, dtype=torch.float64) for _ in range(2))
    return embedding.to(dtype).requires_grad_(), maps.to(dtype).requires_grad_(), toward.to(dtype) - 0.5


def result(form, embedding, maps, toward, *budget):
    "Refined maps, and their gradients to both arguments."
    y = form(embedding, maps, *budget)
    return y.detach(), *torch.autograd.grad(y, (embedding, maps), toward)


SIZES = [(8, 8), (16, 16), (13, 29), (32, 32), (1, 40), (64, 64)]


@pytest.mark.parametrize("h, w", SIZES)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_both_forms_agree_forward_and_backward(h, w, dtype, near):
    given = inputs(2, 16, 3, h, w, dtype)
    plain = result(correlate_plain, *given)
    for a, b in zip(result(correlate, *given), plain):
        assert a.dtype == dtype and a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=near)


@pytest.mark.parametrize("budget", [1, 17, 143, 1001, 2 * 143 * 143, 10**9])
def test_any_block_gives_the_same(budget):
    given = inputs(5, 7, 3, 11, 13, torch.float64)
    for a, b in zip(result(correlate, *given, budget), result(correlate_plain, *given)):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("budget", [1, 5, 64, 4096])
def test_gradients_by_differences(budget):
    embedding, maps, _ = inputs(2, 3, 2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda e, m: correlate(e, m, budget), (embedding, maps))
    cam = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    for suppress in (True, False):
        assert torch.autograd.gradcheck(lambda m: (winner_only if suppress else torch.clone)(max_normalise(m)), (cam,))


def test_only_the_asked_gradient_is_computed(monkeypatch):
    asked, product = [], correlation.symmetric_product

    def noted(block, u, budget):
        asked.append(block.func.__name__)
        return product(block, u, budget)

    monkeypatch.setattr(correlation, "symmetric_product", noted)
    embedding, maps, toward = inputs(1, 4, 2, 5, 5)
    correlate(embedding, maps.detach()).backward(toward)
    correlate(embedding.detach(), maps).backward(toward)
    assert asked == ["affinity_block", "gradient_block", "affinity_block", "affinity_block"]


def test_the_budget_is_kept():
    for batch, pixels in [(8, 64), (8, 100), (3, 1024), (8, 4096), (1, 16384)]:
        for budget in (1, 1000, 2**18, 2**24):
            images, rows = block_shape(batch, pixels, budget)
            assert 1 <= images <= batch and 1 <= rows <= pixels
            assert images * rows * pixels <= max(budget, pixels)


@pytest.mark.parametrize("form", [correlate_plain, correlate])
@pytest.mark.parametrize("nothing", ["embedding", "maps", "both"])
def test_zeros_stay_finite(form, nothing):
    embedding, maps, toward = inputs(2, 4, 3, 6, 6)
    zero = {"embedding": (0, 1), "maps": (1, 0), "both": (0, 0)}[nothing]
    embedding, maps = ((t.detach() * z).requires_grad_() for t, z in zip((embedding, maps), zero))
    y, *gradients = result(form, embedding, maps, toward)
    assert all(t.isfinite().all() for t in (y, *gradients)) and not y.any()
    assert not winner_only(max_normalise(torch.zeros(1, 2, 3, 3))).any()


@pytest.mark.parametrize("form", [correlate_plain, correlate])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(form, dtype):
    given = inputs(2, 8, 3, 9, 9, dtype)
    y, *gradients = result(form, *given[:2], given[2].float())
    wide = form(given[0].detach().float(), given[1].detach().float())
    assert y.dtype == torch.float32 and torch.equal(y, wide)
    assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)


def test_autocast_changes_nothing():
    pcm = PixelCorrelation(8)
    features, maps, _ = inputs(2, 8, 3, 9, 9)
    asked = pcm(features, maps)
    gradient = torch.autograd.grad(asked.square().sum(), pcm.theta.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = pcm(features, maps)
        again = torch.autograd.grad(y.square().sum(), pcm.theta.weight)[0]
        assert pcm(features.bfloat16(), maps.bfloat16()).dtype == torch.float32
    assert torch.equal(y, asked) and torch.allclose(again, gradient, rtol=1e-2, atol=1e-3)


def test_inputs_of_two_types():
    embedding, maps, _ = inputs(1, 4, 2, 5, 5, torch.float64)
    for form in (correlate_plain, correlate):
        assert form(embedding.float(), maps).dtype == form(embedding, maps.float()).dtype == torch.float64
        assert torch.allclose(form(embedding, maps.float()), form(embedding, maps), atol=1e-6)


def test_any_memory_layout_is_read_right():
    embedding, maps, _ = inputs(3, 8, 4, 6, 10)
    asked = correlate_plain(embedding, maps)
    last = (t.detach().to(memory_format=torch.channels_last) for t in (embedding, maps))
    assert torch.allclose(correlate(*last), asked, atol=1e-6)
    turned = (t.detach().transpose(2, 3) for t in (embedding, maps))
    assert torch.allclose(correlate(*turned), asked.transpose(2, 3), atol=1e-6)


def test_normalised_maps_pixel_by_pixel():
    cam = torch.randn(3, 5, 7, 6)
    share, winners = max_normalise(cam), winner_only(max_normalise(cam))
    for b, k, y, x in np.ndindex(3, 5, 7, 6):
        asked = max(cam[b, k, y, x].item(), 0) / (max(cam[b, k].max().item(), 0) + 1e-5)
        assert abs(share[b, k, y, x].item() - asked) < 1e-6
        wins = share[b, k, y, x] == share[b, :, y, x].max()
        assert winners[b, k, y, x] == (share[b, k, y, x] if wins else 0)


@pytest.mark.parametrize("maps", [(2, 3, 4, 4), (1, 3, 4, 5), (3, 4, 5), (2, 3, 5, 4)])
def test_shapes_that_do_not_fit_are_named(maps):
    for call in (correlate, correlate_plain, PixelCorrelation(6)):
        with pytest.raises(CxrError, match=r"\(2, 6, 4, 5\) and"):
            call(torch.rand(2, 6, 4, 5), torch.rand(maps))
    with pytest.raises(CxrError, match="budget = 0"):
        correlate(torch.rand(1, 2, 3, 3), torch.rand(1, 1, 3, 3), budget=0)


def test_theta_of_the_paper():
    "FACTS, 001: 512 -> 256 without bias; part of the published count of parameters."
    assert [p.shape for p in PixelCorrelation(512).parameters()] == [(256, 512, 1, 1)]
    assert PixelCorrelation(512, embedding=32).theta.out_channels == 32


def training_pass(form, embedding, maps):
    torch.autograd.grad(form(embedding, maps), embedding, maps)


@pytest.mark.slow
def test_cost_at_the_size_of_the_paper():
    "Maps of 64 x 64, batch 8, 256 embedding channels, 14 classes: a fifth of the memory, in no more time."
    embedding, maps, _ = inputs(8, 256, 14, 64, 64)
    maps = maps.detach()
    ours, plain = (partial(training_pass, form, embedding, maps) for form in (correlate, correlate_plain))
    peaks = peak_memory(ours), peak_memory(plain)
    assert peaks[0] * 5 <= peaks[1], peaks
    assert_cheap(ours, plain)


@pytest.mark.slow
def test_it_runs_where_the_plain_form_cannot():
    "Maps of 128 x 128, batch 8: the affinities alone would take 8.6 GB, and each training pass holds three of them."
    embedding, maps, _ = inputs(8, 16, 4, 128, 128)
    assert peak_memory(lambda: training_pass(correlate, embedding, maps.detach())) < 2e8
