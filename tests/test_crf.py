"What the notebook of `crf` cannot say: other grids and types, frozen parts, differences, refusals, and cost at size."

import time
from functools import partial

import pytest
import torch

from cxr_book.core import CxrError
from cxr_book.crf import (
    FeatureBranch,
    PacCRF,
    crf_costs,
    gaussian_start,
    kernel_of,
    mean_field,
    messages,
    messages_unfold,
)
from cxr_book.measure import peak_memory

torch.set_num_threads(1)


def random(*shape, seed=0, dtype=torch.float64, learns=False):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_(learns)


def given(batch, classes, h, w, window, dtype=torch.float64, learns=(True, True, True)):
    "z, a kernel and W, all at random."
    shapes = (batch, classes, h, w), (batch, window**2, h, w), (classes, classes, window, window)
    return [random(*s, seed=i, dtype=dtype, learns=need) for i, (s, need) in enumerate(zip(shapes, learns))]


def result(form, tensors):
    "The sum, and the gradients to what learns."
    y = form(*tensors)
    learning = [t for t in tensors if t.requires_grad]
    return y.detach(), *torch.autograd.grad(y, learning, random(*y.shape, seed=9, dtype=y.dtype))


# window 3, not square, one line, one column, one patch, windows wider than the grid
GRIDS = [(5, 6, 3), (4, 9, 7), (1, 8, 5), (8, 1, 5), (1, 1, 3), (2, 3, 11), (3, 2, 9), (20, 20, 19)]


@pytest.mark.parametrize("h, w, window", GRIDS)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_both_forms_agree_forward_and_backward(h, w, window, dtype, near):
    tensors = given(2, 3, h, w, window, dtype)
    for a, b in zip(result(messages, tensors), result(messages_unfold, tensors)):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a - b).abs().max() <= near * b.abs().max()


def alike_in_loops(features, window):
    "exp(-|f_j - f_l|^2 / 2), offset by offset."
    (h, w), reach = features.shape[2:], window // 2
    maps = []
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            y, x = torch.meshgrid(torch.arange(h) + dy, torch.arange(w) + dx, indexing="ij")
            there = (0 <= y) & (y < h) & (0 <= x) & (x < w) & bool(dy or dx)
            other = features[:, :, y.clamp(0, h - 1), x.clamp(0, w - 1)]
            maps.append((-(features - other).square().sum(1) / 2).exp() * there)
    return torch.stack(maps, 1)


@pytest.mark.parametrize("h, w, window", GRIDS)
def test_kernel_and_its_gradient(h, w, window):
    f = random(2, 3, h, w, learns=True)
    ours, asked = kernel_of(f, window), alike_in_loops(f, window)
    assert torch.allclose(ours, asked, rtol=0, atol=1e-14)
    toward = random(*ours.shape, seed=3)
    assert torch.allclose(*(torch.autograd.grad(k, f, toward)[0] for k in (ours, asked)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("h, w, window", [(3, 3, 3), (2, 3, 5)])
def test_gradients_by_differences(h, w, window):
    f, (z, kernel, weight) = random(2, 2, h, w, seed=7, learns=True), given(2, 2, h, w, window)
    scale = torch.tensor([0.7, 1.5]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: kernel_of(f, window), (f,))
    assert torch.autograd.gradcheck(messages, (z, kernel, weight))

    def field(z, f, weight, scale):
        return mean_field(z, kernel_of(f, window), weight, scale, steps=2)

    assert torch.autograd.gradcheck(field, (z, f, weight, scale))


@pytest.mark.parametrize("budget", [1, 3 * 5 * 42, 2 * 3 * 5 * 42 + 1, 10**9])
def test_any_budget_gives_the_same(budget):
    tensors = given(5, 3, 6, 7, 5)
    for a, b in zip(result(partial(messages, budget=budget), tensors), result(messages, tensors)):
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("learns", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_frozen_parts(learns):
    whole = result(messages, given(3, 2, 4, 5, 5))
    asked = [whole[0]] + [g for g, need in zip(whole[1:], learns) if need]
    assert all(map(torch.equal, result(messages, given(3, 2, 4, 5, 5, learns=map(bool, learns))), asked))


def test_a_frozen_kernel_costs_no_gradient():
    z, kernel, weight = given(16, 4, 12, 12, 11, torch.float32, (True, False, True))
    assert peak_memory(lambda: result(partial(messages, budget=1), (z, kernel, weight))) < kernel.nbytes / 2
    with torch.no_grad():
        assert messages(z, kernel, weight).grad_fn is None


def test_each_image_on_its_own():
    z, kernel, weight = given(4, 3, 5, 6, 7)
    alone = torch.cat([messages(a[None], k[None], weight) for a, k in zip(z, kernel)])
    assert torch.allclose(messages(z, kernel, weight), alone, rtol=0, atol=1e-12)
    f = random(4, 3, 5, 6)
    assert torch.equal(kernel_of(f, 7), torch.cat([kernel_of(one[None], 7) for one in f]))


def test_the_same_bits_each_time():
    z, _, weight = given(3, 14, 20, 20, 19, torch.float32)
    f = random(3, 8, 20, 20, dtype=torch.float32, learns=True)

    def once():
        y = mean_field(z, kernel_of(f), weight / 50, steps=3)
        return y, *torch.autograd.grad(y.square().sum(), (z, f, weight))

    assert all(map(torch.equal, once(), once()))


def test_any_memory_layout_is_read_right():
    z, kernel, weight = (t.detach() for t in given(3, 4, 5, 6, 5))
    asked = messages(z, kernel, weight)
    last = (t.to(memory_format=torch.channels_last) for t in (z, kernel, weight))
    assert torch.allclose(messages(*last), asked, rtol=0, atol=1e-13)
    one = kernel[:1].expand(3, -1, -1, -1).requires_grad_()
    y, to_kernel = result(messages, (z, one, weight))
    assert torch.allclose(y, messages(z, one.detach().clone(), weight)) and to_kernel.shape == kernel.shape
    f = random(2, 3, 4, 5)
    assert torch.equal(kernel_of(f.to(memory_format=torch.channels_last), 3), kernel_of(f, 3))


def test_mirrors_and_names_of_classes():
    "A mirrored grid with a mirrored W gives the mirrored field; classes in another order give it in that order."
    unary, f, weight = random(2, 3, 5, 6), random(2, 2, 5, 6, seed=1), random(3, 3, 7, 7, seed=2) / 20
    asked = mean_field(unary, kernel_of(f, 7), weight)
    for axes in ((2,), (3,), (2, 3)):
        mirrored = mean_field(unary.flip(axes), kernel_of(f.flip(axes), 7), weight.flip(axes))
        assert torch.allclose(mirrored.flip(axes), asked, rtol=0, atol=1e-12)
    order = [2, 0, 1]
    assert torch.allclose(mean_field(unary[:, order], kernel_of(f, 7), weight[order][:, order]), asked[:, order])
    turned = mean_field(unary.mT, kernel_of(f.mT, 7), weight.mT)
    assert torch.allclose(turned.mT, asked, rtol=0, atol=1e-12)
    assert torch.allclose(mean_field(-unary, kernel_of(f, 7), weight), -asked)  # 0 and 1 have equal rights


def test_half_precision_is_widened():
    crf, unary, f = PacCRF(3, 5), random(2, 3, 6, 6, dtype=torch.float32), random(2, 4, 6, 6, seed=1, dtype=torch.float32)
    asked = crf(unary, f)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crf(unary, f), asked)
        again = crf(unary.bfloat16(), f.bfloat16())
    assert again.dtype == torch.float32
    assert torch.equal(again, crf(unary.bfloat16().float(), f.bfloat16().float()))
    again.sum().backward()
    assert crf.weight.grad.isfinite().all() and crf.weight.grad.dtype == torch.float32
    z, kernel, weight = given(1, 2, 3, 3, 3)
    assert messages(z.float(), kernel, weight.half()).dtype == torch.float64
    assert kernel_of(f.half(), 3).dtype == torch.float32


def test_far_features_and_sure_logits_stay_finite():
    f = torch.tensor([0.0, 1e4, -1e4]).view(1, 1, 1, 3).requires_grad_()
    unary = torch.tensor([1e4, -1e4, 0]).view(1, 1, 1, 3).requires_grad_()
    y = PacCRF(1, 3)(unary, f)
    assert torch.equal(y, unary)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (f, unary)))


@pytest.mark.parametrize("lean", [True, False])
def test_steps_window_and_start(lean):
    unary, f = random(1, 2, 4, 5, dtype=torch.float32), random(1, 3, 4, 5, dtype=torch.float32, seed=1)
    assert torch.equal(PacCRF(2, 3, steps=0, lean=lean)(unary, f), unary)
    assert torch.equal(PacCRF(2, 9, strength=0, lean=lean)(unary, f), unary)
    crf = PacCRF(2, 9, strength=3, lean=lean)
    step = crf.scale[:, None, None] * unary + messages(2 * unary.sigmoid() - 1, kernel_of(f, 9), crf.weight)
    assert torch.allclose(mean_field(unary, kernel_of(f, 9), crf.weight, steps=1), step, atol=1e-6)
    assert [tuple(p.shape) for p in crf.parameters()] == [(2, 2, 9, 9), (2,)]
    with torch.no_grad():
        crf.scale.copy_(torch.tensor([2.0, 0.5]))
        crf.weight.zero_()
    assert torch.equal(crf(unary, f), unary * torch.tensor([2, 0.5])[:, None, None])


def test_the_start_is_a_gaussian():
    start = gaussian_start(3, 5, 2.0)
    assert torch.allclose(start.sum((2, 3)), 2 * torch.eye(3)) and start[:, :, 2, 2].eq(0).all()
    beside, corner = start[0, 0, 2, 3], start[0, 0, 0, 0]  # 1 and 8 patches^2 away; sigma = 5/4
    assert torch.allclose((beside / corner).log(), torch.tensor(7 / (2 * 1.25**2)))
    assert torch.equal(start, start.flip(2, 3).transpose(0, 1))


@pytest.mark.parametrize("key, value", [("window", 4), ("window", 1), ("n_classes", 0), ("steps", -1), ("strength", -1.0),
                                        ("strength", float("nan"))])  # fmt: skip
def test_settings_that_cannot_be_are_named(key, value):
    with pytest.raises(CxrError, match=f"{key} = {value}"):
        PacCRF(**{key: value})


UNFIT = [((2, 3, 4, 5), (2, 9, 4, 4), (3, 3, 3, 3)), ((2, 3, 4, 5), (1, 9, 4, 5), (3, 3, 3, 3)),
         ((2, 3, 4, 5), (2, 9, 4, 5), (2, 3, 3, 3)), ((2, 3, 4, 5), (2, 15, 4, 5), (3, 3, 3, 5)),
         ((2, 3, 4, 5), (2, 9, 4, 5), (3, 3, 5, 5)), ((3, 4, 5), (2, 9, 4, 5), (3, 3, 3, 3)),
         ((2, 3, 4, 5), (2, 9, 4, 5), (3, 3, 9))]  # fmt: skip


@pytest.mark.parametrize("shapes", UNFIT)
def test_shapes_that_do_not_fit_are_named(shapes):
    for form in (messages, messages_unfold):
        with pytest.raises(CxrError, match="z, kernel and weight have the shapes"):
            form(*map(torch.rand, shapes))


def test_what_else_is_refused():
    z, kernel, weight = given(1, 2, 3, 4, 3)
    with pytest.raises(CxrError, match="budget = 0"):
        messages(z, kernel, weight, budget=0)
    with pytest.raises(CxrError, match="window = 4"):
        messages(z, torch.rand(1, 16, 3, 4), torch.rand(2, 2, 4, 4))
    with pytest.raises(CxrError, match="window = 2"):
        kernel_of(torch.rand(1, 2, 3, 3), 2)
    with pytest.raises(CxrError, match="features have the shape"):
        kernel_of(torch.rand(2, 3, 3), 3)
    crf = PacCRF(2, 3)
    for unary, f in [((1, 3, 4, 4), (1, 2, 4, 4)), ((1, 2, 4, 4), (2, 2, 4, 4)), ((1, 2, 4, 4), (1, 2, 4, 5)),
                     ((2, 4, 4), (1, 2, 4, 4)), ((1, 2, 4, 4), (2, 4, 4))]:  # fmt: skip
        with pytest.raises(CxrError, match=r"unary and features .* expected \(B, 2, h, w\)"):
            crf(torch.rand(unary), torch.rand(f))
    for key in ("size", "features", "width"):
        with pytest.raises(CxrError, match=f"{key} = 0"):
            FeatureBranch(**{key: 0})
    with pytest.raises(CxrError, match="grey images"):
        FeatureBranch()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("size, features, width", [(20, 8, 16), (7, 3, 4)])
def test_feature_branch(size, features, width):
    torch.manual_seed(0)
    branch, images = FeatureBranch(size, features, width), torch.rand(3, 1, 70, 90)
    kinds = [type(m).__name__ for m in branch.layers]
    assert kinds == ["Conv2d", "ReLU", "BatchNorm2d"] * 2  # the paper's order
    f = branch(images)
    assert f.shape == (3, features, size, size)
    kernel_of(f, 5).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in branch.parameters())
    assert branch.layers[-1].weight.grad.abs().max() > 0 and branch.layers[0].weight.grad.abs().max() > 0
    branch.eval()
    assert torch.allclose(branch(images[:1]), branch(images)[:1], atol=1e-6)  # the others no longer matter
    branch.train()
    assert not torch.allclose(branch(images[:1]), branch(images)[:1], atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_of(branch(images), 5).dtype == torch.float32


def test_it_learns_where_to_listen():
    "Noisy logits of a shape that the image shows: after some steps the field is better than the unary, and than at first."
    torch.manual_seed(0)
    x, y = torch.meshgrid(*[torch.arange(10.0)] * 2, indexing="xy")
    centres = torch.randint(2, 8, (24, 2, 1, 1)).float()
    truth = ((x - centres[:, :1]).abs().maximum((y - centres[:, 1:]).abs()) < 2.5).float()  # (24, 1, 10, 10)
    images = 0.3 + 0.4 * torch.nn.functional.interpolate(truth, scale_factor=4) + 0.02 * torch.randn(24, 1, 40, 40)
    unary = 2 * truth - 1 + 1.5 * torch.randn_like(truth)
    branch, crf = FeatureBranch(10, 4, 8), PacCRF(1, 7)
    optimiser = torch.optim.Adam([*branch.parameters(), *crf.parameters()], 0.03)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(crf(unary, branch(images)), truth)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    right = [((t > 0) == (truth > 0.5)).float().mean().item() for t in (unary, crf(unary, branch(images)))]
    assert losses[-1] < losses[0] / 2 and right[0] < 0.85 and right[1] > 0.93, (losses[0], losses[-1], right)


def test_costs_have_a_row_for_each_form():
    costs = crf_costs(6, batch=2, classes=2, window=5, rounds=1)
    assert list(costs.columns) == ["form", "what", "seconds", "bytes"]
    assert list(costs.form) == ["unfold", "lean"] * 2 and list(costs.what) == ["one message"] * 2 + ["mean field"] * 2
    assert (costs[["seconds", "bytes"]] > 0).all(axis=None)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 5])
def test_cost_at_the_size_of_the_paper(steps):
    "20 x 20 patches, window 19, 14 classes, batch 48, all gradients: a quarter of the memory in no more CPU time."
    kernel = kernel_of(random(48, 8, 20, 20, dtype=torch.float32) / 8**0.5).requires_grad_()
    unary = random(48, 14, 20, 20, seed=1, dtype=torch.float32, learns=True)
    weight, scale = gaussian_start(14, 19).requires_grad_(), torch.ones(14, requires_grad=True)
    tensors = unary, kernel, weight, scale

    def training_pass(form):
        y = mean_field(*tensors, steps, form) if steps else form(*tensors[:3])
        return torch.autograd.grad(y, tensors if steps else tensors[:3], torch.ones_like(y))

    def measured(form):
        "Bytes, CPU seconds and gradients of one pass; counting bytes takes some time of each operation, and we have more."
        found = []

        def job():
            start = time.process_time()
            found.extend([*training_pass(form), time.process_time() - start])

        return peak_memory(job), found.pop(), found

    (peak, ours, found), (most, plain, asked) = map(measured, (messages, messages_unfold))
    print(f"{peak / 2**20:.0f} MB and {most / 2**20:.0f} MB, {ours:.1f} s and {plain:.1f} s")
    assert peak * 4 <= most and ours <= plain
    for a, b in zip(found, asked):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
