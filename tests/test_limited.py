"Chapter 13: its losses against the printed equations, what learns in which stage, and whose boxes are never looked at."

import dataclasses
import inspect
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from steps import step

from cxr_book import limited
from cxr_book import study as studies
from cxr_book.bodies import BODIES
from cxr_book.core import FINDINGS, CxrError, Run
from cxr_book.layers import Output, load_strict, save_weights
from cxr_book.learner import Learner, lr_factor, make_optimizer, set_trainable, train_mode
from cxr_book.limited import LOSSES, Annotations, Bounds, Fold, LimitedSettings, PatchNet
from cxr_book.loader import Augment, Batch, move_points, sample_affines
from cxr_book.localization import box_patches
from cxr_book.splits import LeakySplit, Split, leaks
from cxr_book.study import open_study

SETTINGS = LimitedSettings.from_preset(
    "smoke", body="small-resnetv2", stride=8, patches=8, hidden=8, window=5, steps=2, features=2, image_size=64, batch_size=8,
    weights=None, pretrain_epochs=0, rounds=2, epochs=(2, 1), bounds=(0.7, 0.05, 4, 2), crf=True, blur=True, form="relu",
    folds=2, by="patient", tested=None, valid=0.3, augment={}, schedule="constant", seed=0,
)  # fmt: skip
SCORES, REFINED = {"body", "conv", "norm", "score"}, {"branch", "crf"}
FORMS = list(LOSSES)


def batch_of(n=4, side=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, side, side, generator=g), (torch.rand(n, 14, generator=g) < 0.3).float()
    return Batch(x, y, torch.arange(n), torch.eye(3).expand(n, 3, 3))


class Given:
    "Annotations that are the same for every batch: a box of the first three findings in every other image."

    def __call__(self, batch):
        b = torch.zeros(len(batch.x), 14, 8, 8)
        b[::2, :3, 2:5, 1:4] = 1
        return b


def net_of(annotations=None, **changes):
    torch.manual_seed(0)
    return PatchNet(SETTINGS.but(**changes), batch_of(50).y.numpy(), annotations)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "The smoke drawn set: 60 images of 18 patients, 7 of the test list's 15 with boxes."
    folder = tmp_path_factory.mktemp("limited")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CXR_BOOK_HOME", str(folder))
        yield open_study(SETTINGS, "test", folder / "run")


def test_the_defaults_are_the_papers():
    s = LimitedSettings()
    assert (s.body, s.weights, s.stride, s.blur, s.patches, s.image_size) == ("resnetv2-50", "imagenet", 32, True, 20, 512)
    assert (s.lambda_ann, s.optimizer, s.weight_decay, s.lr, s.schedule) == (70, "adam", 0.01, 1e-3, "exponential")
    assert (s.form, s.crf, s.window, s.folds, s.by, s.tested, s.unannotated) == ("relu", True, 19, 5, "patient", None, 0.2)
    assert s.augment == Augment() and s.normals is None and s.rounds > 1 and s.batch_size == 48
    assert BODIES[s.body].mean == BODIES[SETTINGS.body].mean == "symmetric"
    grey = net_of().body.grey(torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3))
    assert torch.equal(grey, torch.tensor([-1.0, 0.0, 1.0]).expand(1, 3, 1, 3))


@pytest.mark.parametrize("change", [dict(form="hinge"), dict(by="scan"), dict(met=0.0), dict(met=1.0), dict(leash=0.5),
                                    dict(patches=1), dict(bounds=(0.7, 0.05, 4)), dict(lambda_ann=0), dict(epochs=(1, -1)),
                                    dict(unannotated=0), dict(rounds=0), dict(tested=0), dict(prior=1), dict(steps=-1),
                                    dict(windw=5)])  # fmt: skip
def test_impossible_settings_are_refused(change):
    with pytest.raises(CxrError, match=next(iter(change))):
        SETTINGS.but(**change)


def test_an_even_window_and_a_stride_that_the_body_lacks_are_refused():
    for change in (dict(window=6), dict(stride=32)):
        with pytest.raises(CxrError, match=f"{next(iter(change))} = {next(iter(change.values()))}"):
            net_of(**change)


# ---------------------------------------------------------------- the losses


def case(seed=0, n=6, k=3, side=4, spread=2.0):
    "Logits, labels, boxes of some findings of some images, bounds; all float64."
    rng = np.random.default_rng(seed)
    y, a = (rng.random((2, n, k)) < 0.5).astype(float)
    box = np.zeros((side, side))
    boxes = []
    for _ in range(n * k):
        (y0, x0), (h, w) = rng.integers(0, side, 2), rng.integers(1, side + 1, 2)
        boxes.append(box.copy())
        boxes[-1][y0 : y0 + h, x0 : x0 + w] = 1
    b = np.stack(boxes).reshape(n, k, side, side) * a[..., None, None]
    b[0, 0], b[1, 1] = 1, 0  # all patches, none
    bounds = np.stack([rng.uniform(*r, k) for r in ((0.3, 0.9), (0.05, 0.5), (3, 9), (2, 8))])
    u = rng.normal(size=b.shape) * spread
    return *map(torch.from_numpy, (u, y, b)), Bounds(*torch.from_numpy(bounds))


def printed(form, u, y, b, bounds, gamma):
    "L_ann and L_un as the paper prints them, image by image, class by class, patch by patch."
    sigma, relu = (lambda v: 1 / (1 + math.exp(-v))), (lambda v: max(v, 0.0))
    annotated, unannotated = np.zeros(y.shape), np.zeros(y.shape)
    for i in range(y.shape[0]):
        for k in range(y.shape[1]):
            z, box, has = [sigma(v) for v in u[i, k].flatten().tolist()], b[i, k].flatten().tolist(), float(y[i, k])
            if form.startswith("li"):
                low = 0.98 if form == "li-heuristic" else 0.0
                joint, none = 1.0, 1.0
                for z_j, b_j in zip(z, box):
                    joint *= low + (1 - low) * (z_j if b_j else 1 - z_j)  # Eq. 1
                    none *= low + (1 - low) * (1 - z_j)  # Eq. 2
                annotated[i, k] = -math.log(joint)
                unannotated[i, k] = -math.log(1 - none) if has else -math.log(none)
                continue
            tau, rho, tau_hat, rho_hat = (float(t[k]) for t in bounds)
            size, rest = sum(box), len(box) - sum(box)
            inside, outside = (sum(z_j for z_j, b_j in zip(z, box) if b_j == side) for side in (1, 0))
            if form == "sigmoid":  # Eqs. 5 and 8
                annotated[i, k] = -sigma(inside - tau * size) * sigma(rho * rest - outside)
                unannotated[i, k] = -has * sigma(sum(z) - tau_hat) - gamma * (1 - has) * sigma(rho_hat - sum(z))
            else:  # Eqs. 9 and 11
                annotated[i, k] += relu(tau * size - inside) / size if size else 0
                annotated[i, k] += relu(outside - rho * rest) / rest if rest else 0
                unannotated[i, k] = has * relu(tau_hat - sum(z)) + gamma * (1 - has) * relu(sum(z) - rho_hat)
    return annotated, unannotated


def weighed(annotated, unannotated, b, lambda_ann):
    "Eq. 3, mean over images."
    total = 0.0
    for i in range(len(b)):
        for k in range(b.shape[1]):
            total += lambda_ann * annotated[i, k] if b[i, k].any() else unannotated[i, k]
    return total / len(b)


@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_losses_are_the_printed_ones(form, gamma):
    for seed in range(4):
        u, y, b, bounds = case(seed)
        terms, asked = LOSSES[form](u, y, b, bounds, gamma), printed(form, u, y, b, bounds, gamma)
        for ours, theirs in zip(terms, asked):
            assert ours.dtype == torch.float64 and np.abs(ours.numpy() - theirs).max() < 1e-10
        parts = limited.weigh(*terms, b, 70.0)
        assert abs(sum(parts).item() - weighed(*asked, b, 70.0)) < 1e-9
        assert abs(parts[0].item() - weighed(asked[0], 0 * asked[1], b, 70.0)) < 1e-9  # the two are told apart


def test_the_misprint_of_eq_12_would_be_another_loss():
    u, y, b, bounds = case(side=6)
    outside, n = ((1 - b) * u.sigmoid()).sum((2, 3)), b.sum((2, 3)).clamp(min=1)
    twice = (outside - bounds.rho * n).relu() / n
    m = (1 - b).sum((2, 3)).clamp(min=1)
    complement = (outside - bounds.rho * m).relu() / m
    first = limited.relu_terms(u, y, b, bounds)[0] - complement
    assert torch.allclose(first, (bounds.tau * b.sum((2, 3)) - (b * u.sigmoid()).sum((2, 3))).relu() / n, atol=1e-12)
    assert (twice - complement).abs()[b.any(3).any(2)].max() > 0.1


@pytest.mark.parametrize("stage", ["patches 1", "crf"])
@pytest.mark.parametrize("form", FORMS)
def test_the_networks_loss_is_that_of_its_maps(form, stage):
    net, batch = net_of(Given(), form=form).eval(), batch_of(4)
    torch.nn.init.normal_(net.score.weight, std=0.5)
    net.bounds.copy_(torch.tensor([[0.8], [0.01], [9.0], [0.5]]) + torch.linspace(0, 0.1, 14))
    with torch.no_grad():
        losses, out = net.loss(batch, stage), net.view("crf" if stage == "crf" else "unary")(batch.x)
    b = Given()(batch)
    asked = weighed(*printed(form, out.maps.double(), batch.y, b, net.bounds.double(), net.gamma), b, net.settings.lambda_ann)
    assert losses["loss"].item() == pytest.approx(asked, rel=1e-5) and torch.equal(losses["logits"], out.logits)
    assert losses["loss"].item() == pytest.approx((losses["annotated"] + losses["unannotated"]).item(), rel=1e-6)


def test_relu_is_zero_and_flat_exactly_where_the_constraints_hold():
    g, ones = torch.Generator().manual_seed(0), torch.ones(1)
    bounds = Bounds(0.7 * ones, 0.05 * ones, 8 * ones, 4 * ones)
    b = torch.zeros(20, 1, 20, 20)
    b[:, :, 3:9, 4:12] = 1
    u = torch.randn(20, 1, 20, 20, generator=g)
    for box, y in ((b, 1.0), (b, 0.0), (torch.ones_like(b), 1.0), (torch.zeros_like(b), 0.0)):
        kept = torch.where(box > 0, 3 + u, -7 + u).requires_grad_()
        terms = limited.relu_terms(kept, torch.full((20, 1), y), box, bounds)
        loss = terms[0] if box.any() else terms[1]
        assert (loss == 0).all() and (torch.autograd.grad(loss.sum(), kept)[0] == 0).all()
    kept = torch.where(b > 0, 3 + u, -7 + u).requires_grad_()
    assert (limited.relu_terms(kept, torch.ones(20, 1), b, bounds)[1] == 0).all()  # 48 patches: at least 8
    for broken in (torch.where(b > 0, u, -7 + u), torch.where(b > 0, 3 + u, u)):
        broken.requires_grad_()
        loss = limited.relu_terms(broken, torch.ones(20, 1), b, bounds)[0]
        assert (loss > 0).all() and torch.autograd.grad(loss.sum(), broken)[0].abs().sum() > 0


def test_sigmoid_terms_lie_between_minus_one_and_zero():
    for seed in range(20):
        u, y, b, bounds = case(seed, spread=10.0, side=7)
        for term in limited.sigmoid_terms(u, y, b, bounds, gamma=0.5):
            assert (-1 <= term).all() and (term <= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_everything_is_finite(form):
    b = torch.zeros(3, 1, 20, 20)
    b[1], b[2, :, 5:9, 3:17] = 1, 1
    bounds = Bounds(*torch.tensor([[0.7], [0.05], [4.0], [2.0]]))
    levels = (0.0, 30.0, -30.0, 200.0, -200.0, 1e4, -1e4)
    logits = [torch.full_like(b, v) for v in levels] + [torch.where(b > 0, v, -v) for v in levels]
    for u in (*logits, torch.tensor(levels)[torch.arange(1200) % 7].view_as(b)):
        for y in (0.0, 1.0):
            u = u.detach().requires_grad_()
            terms = LOSSES[form](u, torch.full((3, 1), y), b, bounds, 0.1)
            slope = torch.autograd.grad(sum(limited.weigh(*terms, b, 70.0)), u, retain_graph=True)[0]
            both = torch.autograd.grad(sum(t.sum() for t in terms), u)[0]
            assert all(t.isfinite().all() for t in (*terms, slope, both)), (form, y, u.unique())


def test_the_product_underflows_and_the_logarithms_do_not():
    u, y, b = torch.zeros(1, 1, 20, 20), torch.ones(1, 1), torch.zeros(1, 1, 20, 20)
    b[..., :5, :5] = 1
    product = torch.where(b > 0, u.sigmoid(), 1 - u.sigmoid()).flatten().prod()
    assert product == 0 and -product.log() == torch.inf
    asked = printed("li", u, y, b, None, 1)[0].item()  # in float64 it is 4e-121
    assert limited.li_terms(u, y, b)[0].item() == pytest.approx(asked, rel=1e-6) and asked == pytest.approx(400 * math.log(2))
    faint = torch.full((1, 1, 20, 20), -20.0)
    assert (1 - (1 - faint.sigmoid()).prod()).log() == -torch.inf
    assert limited.li_terms(faint, y, b)[1].item() == pytest.approx(20 - math.log(400), rel=1e-5)


def softplus(u):
    return max(u, 0.0) + math.log1p(math.exp(-abs(u)))


@pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-5), (torch.float64, 1e-5)])  # s^2 / 24 is left out below s = 0.01
def test_at_least_one_patch_over_all_logits(dtype, near):
    levels = np.r_[np.linspace(-100, 50, 601), -15 + np.linspace(-0.01, 0.01, 5), -10.6 + np.linspace(-0.1, 0.1, 41)]
    u = torch.tensor(levels, dtype=dtype)[:, None, None, None] + torch.linspace(-3, 3, 400, dtype=dtype).view(1, 1, 20, 20)
    for one in (False, True):  # all patches alike, or one that stands out
        if one:
            u = u.where(torch.arange(400).view(20, 20) == 77, u.new_tensor(-110.0))
        some, s = limited.log_any(u)
        for ours, mass, logits in zip(some.flatten().tolist(), s.flatten().tolist(), u.flatten(1).tolist()):
            total = math.fsum(map(softplus, logits))
            assert ours == pytest.approx(math.log(-math.expm1(-total)), rel=near, abs=near)
            assert mass == pytest.approx(total, rel=10 * near)


def test_the_heuristic_keeps_every_factor_above_098():
    u = torch.tensor(np.linspace(-30, 50, 81)).view(-1, 1, 1, 1).expand(-1, 1, 20, 20)
    some, s = limited.log_any(u, 0.98)
    assert s.max().item() == pytest.approx(-400 * math.log(0.98)) and (s > 0).all() and (s.diff(dim=0) >= 0).all()
    for ours, v in zip(some.flatten().tolist(), u[:, 0, 0, 0].tolist()):
        total = -400 * math.log1p(-0.02 / (1 + math.exp(-v)))
        assert ours == pytest.approx(math.log(-math.expm1(-total)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_differences(form):
    u, y, b, bounds = case(3, n=3, k=2, side=3)
    u[2, 0] -= 20  # patches of next to nothing
    y[2, 0] = 1
    terms = partial(LOSSES[form], y=y, b=b, bounds=bounds, gamma=0.4)
    if form == "relu":  # no constraint is just met
        inside, outside, n, m = limited._counts(u.sigmoid(), b)
        total = inside + outside
        gaps = bounds.tau * n - inside, outside - bounds.rho * m, total - bounds.tau_hat, total - bounds.rho_hat
        assert min(gap[(n > 0) & (m > 0)].abs().min() for gap in gaps[:2]) > 1e-3 and min(g.abs().min() for g in gaps[2:]) > 1e-3
    assert torch.autograd.gradcheck(lambda v: terms(v), u.requires_grad_(), atol=1e-6)


# ---------------------------------------------------------------- thresholds


def test_tallies_are_counts():
    u, y, b, _ = case(5)
    found = limited.tally(u, y, b).numpy()
    for i in range(len(u)):
        for k in range(u.shape[1]):
            z, box = u[i, k].sigmoid().numpy(), b[i, k].numpy() > 0
            of_box = [z[box].mean() if box.any() else np.nan, z[~box].mean() if box.any() and not box.all() else np.nan]
            total = [z.sum() if y[i, k] else np.nan, np.nan if y[i, k] else z.sum()]
            assert np.allclose(found[i, :, k], of_box + total, equal_nan=True, atol=1e-12)


START = (0.6, 0.05, 4.0, 2.0)


def test_a_share_of_the_images_meets_the_fitted_bounds():
    start = torch.tensor(START)[:, None].expand(4, 1)
    tallies = torch.stack([torch.linspace(*ends, 11) for ends in ((0.6, 0.9), (0.02, 0.04), (5, 15), (0.6, 1.6))], 1)[..., None]
    for met, asked in ((0.5, (0.75, 0.03, 10, 1.1)), (0.9, (0.63, 0.038, 6, 1.5))):
        found = limited.fit_bounds(tallies, start, START, met)
        assert torch.allclose(found[:, 0], torch.tensor(asked), atol=1e-6)
        meets = [(tallies[:, i] >= found[i] - 1e-6) if i % 2 == 0 else (tallies[:, i] <= found[i] + 1e-6) for i in range(4)]
        assert all(met <= m.float().mean() <= met + 0.1 for m in meets)


@pytest.mark.parametrize("leash", [1.0, 1.3, 4.0, 100.0])
def test_fitted_bounds_stay_between_the_start_and_the_leash(leash):
    rng = np.random.default_rng(int(leash))
    for trial in range(60):
        start = tuple(rng.uniform((0.05, 0.001, 0.5, 0.1), (0.95, 0.5, 30, 20)).tolist())
        sizes = np.array([1, 1, 400, 400])[:, None]
        tallies = rng.random((rng.integers(1, 30), 4, 5)) ** rng.uniform(0.2, 5) * sizes
        tallies[rng.random(tallies.shape) < rng.uniform(0, 1)] = np.nan
        tallies, now = torch.tensor(tallies).float(), torch.tensor(start)[:, None].repeat(1, 5)
        tau, rho, tau_hat, rho_hat = found = limited.fit_bounds(tallies, now, start, rng.uniform(0.05, 0.95), leash)
        one = 1 + 1e-6
        assert (tau * one >= start[0]).all() and (tau <= min(start[0] * leash, max(0.95, start[0])) * one).all()
        assert (rho <= start[1] * one).all() and (rho * one >= start[1] / leash).all()
        assert (tau_hat * one >= start[2]).all() and (tau_hat <= start[2] * leash * one).all()
        assert (rho_hat <= start[3] * one).all() and (rho_hat * one >= start[3] / leash).all()
        again = limited.fit_bounds(tallies[torch.from_numpy(rng.permutation(len(tallies)))], now, start, 0.5, leash)
        assert torch.equal(again, limited.fit_bounds(tallies, now, start, 0.5, leash))
        if leash == 1:
            assert torch.allclose(found, now)


def test_a_class_without_a_case_keeps_its_bounds():
    now = torch.tensor([[0.62, 0.7], [0.02, 0.03], [5.0, 6.0], [1.5, 1.0]])
    tallies = torch.tensor([0.8, 0.04, 9.0, 1.9])[:, None].repeat(7, 1, 2)
    tallies[:, :, 1] = torch.nan
    found = limited.fit_bounds(tallies, now, START)
    assert torch.equal(found[:, 1], now[:, 1]) and torch.allclose(found[:, 0], tallies[0, :, 0])


def test_thresholds_are_fitted_before_each_stage_but_the_first():
    class Train:
        def epoch(self, number):
            return iter([batch_of(5), batch_of(7, seed=1)])

    net, start = net_of(Given(), bounds=(0.01, 0.9, 0.5, 60), leash=1000), torch.tensor([0.01, 0.9, 0.5, 60.0])[:, None]
    torch.nn.init.normal_(net.score.weight, std=0.5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.begin("patches 1", Train())
    assert torch.equal(net.bounds, start.expand(4, 14))
    for stage in ("patches 2", "crf"):
        net.bounds.copy_(start.expand(4, 14))
        net.begin(stage, Train())
        with torch.no_grad():
            u, y, b = (torch.cat(t) for t in zip(*((net.eval().unary(t.x), t.y, Given()(t)) for t in Train().epoch(0))))
        z = u.sigmoid()
        assert torch.allclose(net.bounds[0, 1], (z[b[:, 1, 2, 1] > 0, 1, 2:5, 1:4]).mean((1, 2)).quantile(0.5))
        assert torch.allclose(net.bounds[3, 7], z[y[:, 7] == 0, 7].sum((1, 2)).quantile(0.5))
        assert torch.equal(net.bounds[:2, 7], start[:2, 0])  # without a box
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k != "bounds")
    li = net_of(Given(), form="li")
    li.begin("patches 2", Train())
    assert torch.equal(li.bounds, torch.tensor(SETTINGS.bounds)[:, None].expand(4, 14))


# ---------------------------------------------------------------- boxes as patches


def with_boxes(study, boxes):
    "The drawn set with other boxes: (row, finding, x0, y0, x1, y1)."
    table = pd.DataFrame(boxes, columns=study.radiographs.boxes.columns).astype(study.radiographs.boxes.dtypes)
    return dataclasses.replace(study.radiographs, boxes=table)


def random_boxes(n=40, seed=0):
    rng = np.random.default_rng(seed)
    corner, extent = rng.uniform(0, 0.6, (n, 2)), rng.uniform(0.15, 0.4, (n, 2))
    return [(int(r), int(f), *c, *(c + e)) for r, f, c, e in zip(rng.integers(0, 12, n), rng.integers(0, 8, n), corner, extent)]


def looking(rows, affine=None):
    n = len(rows)
    A = torch.eye(3).expand(n, 3, 3) if affine is None else affine
    return Batch(torch.zeros(n, 1, 8, 8), torch.zeros(n, 14), torch.tensor(rows), A)


@pytest.mark.parametrize("side", [8, 20])
def test_boxes_as_patches_without_augmentation_and_united(study, side):
    boxes, rows = random_boxes(), [3, 11, 0, 3, 7]
    b = Annotations(with_boxes(study, boxes), np.arange(12), side)(looking(rows))
    asked = np.zeros((5, 14, side, side), bool)
    for at, row in enumerate(rows):
        for r, f, *box in boxes:
            if r == row:
                asked[at, f] |= box_patches([box], (side, side))[0]
    assert b.dtype == torch.float32 and np.array_equal(b.numpy(), asked.astype(np.float32))
    assert len({(r, f) for r, f, *_ in boxes}) < len(boxes) and torch.equal(b[0], b[3])  # some findings have two


def test_a_mirrored_image_has_mirrored_patches(study):
    data, rows = with_boxes(study, random_boxes()), list(range(12))
    A = sample_affines(12, Augment(flip=1.0), torch.Generator().manual_seed(0))
    plain, mirrored = (Annotations(data, np.arange(12), 20)(looking(rows, a)) for a in (None, A))
    assert torch.equal(mirrored, plain.flip(3)) and not torch.equal(mirrored, plain)


def test_patches_follow_the_augmentation(study):
    boxes = [*{box[:2]: box for box in random_boxes(60, 1)}.values()]  # one of a finding
    rows = [*range(12)] * 3
    A = sample_affines(36, Augment(flip=0.5, shift=0.25, zoom=0.1, crop_scale=(0.7, 1)), torch.Generator().manual_seed(1))
    b = Annotations(with_boxes(study, boxes), np.arange(12), 20)(looking(rows, A)).numpy() > 0
    centres = (np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1) + 0.5) / 20  # x, y
    asked = np.zeros_like(b)
    for at, row in enumerate(rows):
        x, y = np.moveaxis(move_points(centres, A[at]), -1, 0)
        for r, f, x0, y0, x1, y1 in boxes:
            if r == row:
                asked[at, f] |= (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)
    slivers = b.any((2, 3)) & ~asked.any((2, 3))  # no centre in what the frame leaves of the box: the nearest row or column
    assert all(min(np.ptp(np.nonzero(s), 1)) == 0 for s in b[slivers]) and slivers.sum() < 10
    assert np.array_equal(b & ~slivers[..., None, None], asked) and asked.any((2, 3)).sum() > 100


def test_a_box_that_left_the_frame_gives_nothing(study):
    data = with_boxes(study, [(0, 4, 0.1, 0.1, 0.3, 0.3), (0, 5, 0.6, 0.6, 0.9, 0.9), (0, 6, 0.3, 0.3, 0.7, 0.7)])
    right = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0, 0, 1]])  # the right half fills the frame
    b = Annotations(data, np.arange(3), 20)(looking([0], right[None]))[0]
    assert not b[4].any() and b[5].any() and torch.equal(b[6].nonzero().amin(0), torch.tensor([6, 0]))
    away = torch.tensor([[1, 0, 3.0], [0, 1, 0], [0, 0, 1]])
    assert not Annotations(data, np.arange(3), 20)(looking([0], away[None])).any()


def test_rows_that_were_not_given_stay_closed(study):
    boxes = random_boxes()
    given = np.array([1, 4, 5])
    poisoned = [(r, f, *((0.0, 0.0, 1.0, 1.0) if r not in given else box)) for r, f, *box in boxes]
    clean, bad = (Annotations(with_boxes(study, t), given, 8)(looking([*range(12)])) for t in (boxes, poisoned))
    assert torch.equal(clean, bad) and clean[given].any((1, 2, 3)).all()
    assert not clean[np.setdiff1d(range(12), given)].any()


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("height, width", [(64, 64), (50, 67), (33, 33), (96, 40)])
def test_maps_are_always_p_by_p(height, width):
    net = net_of().eval()
    with torch.no_grad():
        for answer in limited.ANSWERS:
            out = net.view(answer)(torch.rand(2, 1, height, width))
            assert out.maps.shape == (2, 14, 8, 8) and out.logits.shape == (2, 14)


def test_every_patch_starts_at_the_prior():
    net = net_of(prior=0.05)
    torch.nn.init.zeros_(net.score.weight)
    assert torch.allclose(net.view("unary")(batch_of().x).maps.sigmoid(), torch.tensor(0.05))


def test_the_image_logit_counts_patches():
    net = net_of().eval()
    net.bounds[2] = torch.arange(14)
    with torch.no_grad():
        out = net(batch_of().x)
    for i, k in ((0, 0), (3, 9)):
        count = math.fsum(1 / (1 + math.exp(-u)) for u in out.maps[i, k].flatten().tolist())
        assert out.logits[i, k].item() == pytest.approx(count - k, abs=1e-4)


@pytest.mark.parametrize("form", ["li", "li-heuristic"])
@pytest.mark.parametrize("bias", [-60.0, -9.0, -3.0, 2.0])
def test_the_image_logit_of_li_is_the_log_odds_of_at_least_one_patch(form, bias):
    net = net_of(form=form).eval().view("unary")
    torch.nn.init.constant_(net.score.bias, bias)
    with torch.no_grad():
        out = net(batch_of().x)
    for i, k in ((0, 0), (3, 9)):
        s = math.fsum(map(softplus, out.maps[i, k].flatten().tolist()))
        log_odds = math.log(-math.expm1(-s)) + s
        assert out.logits[i, k].item() == pytest.approx(log_odds, rel=1e-5, abs=2e-5)


def test_views_are_answers_of_one_network():
    net = net_of().eval()
    x = batch_of().x
    with torch.no_grad():
        out, unary, crf = net(x), *(net.view(name)(x) for name in limited.ANSWERS)
    assert torch.equal(out.maps, crf.maps) and torch.equal(out.extras["unary"], unary.maps)
    assert not torch.equal(unary.maps, crf.maps) and net.answer == "crf" and net_of(crf=False).answer == "unary"
    assert all(a is b for a, b in zip(net.parameters(), net.view("unary").parameters()))
    with pytest.raises(CxrError, match="unary"):
        net.view("unery")
    built = limited.methods(SETTINGS)
    assert {name: build().answer for name, build in built.items()} == {"unary": "unary", "crf": "crf"}
    alone = built["unary"]().eval()
    alone.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(alone(x).maps, unary.maps)


@pytest.mark.parametrize("stage, learns", [(0, SCORES), (1, SCORES), (2, REFINED)])
def test_what_learns_in_which_stage(stage, learns):
    net, batch = net_of(Given()), batch_of()
    stage = net.stages()[stage]
    losses, changed = step(net, batch, stage)
    assert changed == learns and torch.isfinite(losses["loss"])  # neither weights, moving statistics nor bounds of the rest
    assert all((p.grad is not None and p.grad.isfinite().all()) == p.requires_grad for p in net.parameters())


def test_rounds_share_the_epochs_and_one_decay():
    s = SETTINGS.but(epochs=(7, 3), rounds=3, schedule="exponential", decay=0.8, lr=0.01, crf_lr=0.02)
    stages = PatchNet(s).stages()
    assert [(t.name, t.epochs) for t in stages] == [("patches 1", 2), ("patches 2", 2), ("patches 3", 3), ("crf", 3)]
    rates = [t.lr * lr_factor(t, (e + 0.5) / t.epochs) for t in stages for e in range(t.epochs)]
    assert np.allclose(rates, [0.01 * 0.8**e for e in range(7)] + [0.02 * 0.8**e for e in range(3)])
    assert all((t.optimizer, t.weight_decay, t.keep) == (s.optimizer, s.weight_decay, "last") for t in stages)
    assert [t.name for t in PatchNet(s.but(crf=False, rounds=1)).stages()] == ["patches 1"]


def test_without_labels_it_predicts_and_says_why_it_cannot_learn():
    net = PatchNet(SETTINGS).eval()
    assert net(batch_of().x).logits.shape == (4, 14)
    with pytest.raises(CxrError, match="labels"):
        net.loss(batch_of(), "patches 1")


def test_gamma_is_the_ratio_of_positive_to_negative_labels():
    labels = np.zeros((10, 14), np.uint8)
    labels[:7, :10] = 1
    assert PatchNet(SETTINGS, labels).gamma == 70 / 70
    assert PatchNet(SETTINGS, np.repeat(labels[:1], 500, 0)).gamma == pytest.approx(10 / 4)  # no sum in eight bits


def test_one_file_of_a_body_serves_with_filters_and_without(tmp_path):
    blurred, plain = net_of(), net_of(blur=False)
    assert [n for n, _ in blurred.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert blurred.state_dict().keys() == plain.state_dict().keys()
    for body in (blurred.body, plain.body):
        file = str(save_weights(body, tmp_path / "body.safetensors"))
        for blur in (True, False):
            torch.manual_seed(1)
            net = PatchNet(SETTINGS.but(weights=file, blur=blur))
            assert all(torch.equal(v, body.state_dict()[k]) for k, v in net.body.state_dict().items())
    with torch.no_grad():
        a, b = (n.eval().view("unary")(batch_of().x).maps for n in (blurred, plain))
    assert not torch.allclose(a, b)


def test_bounds_are_saved_with_the_weights(tmp_path):
    net, again = net_of(), PatchNet(SETTINGS)
    net.bounds.copy_(torch.rand(4, 14))
    load_strict(again, save_weights(net, tmp_path / "net.safetensors"))
    assert torch.equal(again.bounds, net.bounds)
    assert torch.equal(again.eval()(batch_of().x).logits, net.eval()(batch_of().x).logits)


# ---------------------------------------------------------------- folds


def of(study, **changes):
    return dataclasses.replace(study, settings=study.settings.but(**changes))


def boxed_in(study, rows):
    return np.intersect1d(study.radiographs.boxed, rows)


@pytest.mark.parametrize("by, k", [("patient", 2), ("patient", 3), ("image", 2), ("image", 5)])
def test_every_image_of_the_test_part_is_tested_once(study, by, k):
    found = limited.make_folds(of(study, by=by, folds=k))
    tested = np.concatenate([fold.test for fold in found])
    assert [fold.number for fold in found] == [*range(k)]
    assert np.array_equal(np.sort(tested), study.split.test)  # those without boxes too, and none twice
    boxed = boxed_in(study, study.split.test)
    for fold in found:
        assert len(boxed_in(study, fold.test)) and np.array_equal(fold.learn, np.setdiff1d(boxed, fold.test))
        assert by == "image" or leaks(study.radiographs, fold.learn, fold.test).images == 0
    total = sum(leaks(study.radiographs, fold.learn, fold.test).images for fold in found)
    assert (total > 0) == (by == "image")  # the drawn patients come again


def test_no_more_folds_than_are_asked_for(study):
    whole = limited.make_folds(of(study, folds=3))
    sizes = np.cumsum([len(boxed_in(study, fold.test)) for fold in whole])
    for tested, n in ((1, 1), (int(sizes[0]), 1), (int(sizes[0]) + 1, 2), (10_000, 3)):
        some = limited.make_folds(of(study, folds=3, tested=tested))
        assert len(some) == n
        assert all(np.array_equal(a.test, b.test) and np.array_equal(a.learn, b.learn) for a, b in zip(some, whole))


@pytest.fixture
def given(monkeypatch):
    "What `fit_fold` hands to `fit`, instead of a training: the study, the run's name, the network."
    calls = []

    def fit(study, name, build, stages=None):
        calls.append((study, name, build()))
        return calls[-1][2], []

    monkeypatch.setattr(limited, "fit", fit)
    return calls


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_what_a_fold_trains_on(study, given, k, share):
    data, list_ = study.radiographs, study.split.train
    for fold in limited.make_folds(of(study, folds=k)):
        net, _ = limited.fit_fold(study, fold, "name", SETTINGS, share)
        here, name, _ = given[-1]
        train = here.split.train
        assert name == "name" and type(here.split) is Split and np.array_equal(here.split.test, fold.test)
        assert np.array_equal(here.split.valid, study.split.valid)
        assert np.isin(fold.learn, train).all() and np.isin(train, np.r_[fold.learn, list_]).all()
        assert len(train) == len(fold.learn) + round(share * len(list_))  # unannotated images included:
        assert leaks(data, train, fold.test).images == leaks(data, train, here.split.valid).images == 0
        rows = np.array([*net.annotations.of])
        assert np.array_equal(np.sort(rows), fold.learn) and np.array_equal(np.unique(net.annotations.pairs.row), fold.learn)
        assert not np.isin(rows, np.r_[fold.test, list_]).any() and len(boxed_in(study, list_)) > 0
        labels = data.labels[train].astype(int)
        assert net.gamma == pytest.approx(labels.sum() / (labels == 0).sum())


def test_other_images_are_the_same_for_every_fold_and_nested(study, given):
    found = limited.make_folds(study)
    sets = []
    for share in (0.1, 0.3, 0.9):
        for fold in found:
            limited.fit_fold(study, fold, "name", SETTINGS, share)
        extra = [set(np.setdiff1d(here.split.train, fold.learn)) for (here, *_), fold in zip(given[-len(found) :], found)]
        assert all(e == extra[0] for e in extra)
        sets.append(extra[0])
    assert sets[0] < sets[1] < sets[2]


def test_shares_of_boxes_are_nested_and_the_images_stay(study, given):
    fold, n = limited.make_folds(of(study, folds=3))[0], len(boxed_in(study, study.split.test))
    opened = []
    for boxes in (0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 1.0):
        net, _ = limited.fit_fold(study, fold, "name", SETTINGS, 0.2, boxes)
        opened.append(set(net.annotations.of))
        assert len(opened[-1]) == min(math.ceil(boxes * n), len(fold.learn)) and opened[-1] <= set(fold.learn.tolist())
        assert np.array_equal(given[-1][0].split.train, given[0][0].split.train)
    assert not opened[0] and all(a <= b for a, b in zip(opened, opened[1:])) and opened[-1] == set(fold.learn.tolist())


def test_folds_by_image_leak_and_are_trained_on_as_such(study, given):
    found = limited.make_folds(of(study, by="image"))
    fold = max(found, key=lambda f: leaks(study.radiographs, f.learn, f.test).images)
    limited.fit_fold(study, fold, "name", SETTINGS.but(by="image"))
    split = given[-1][0].split
    assert type(split) is LeakySplit and leaks(study.radiographs, split.train, split.test).images > 0
    with pytest.raises(CxrError, match="patient"):  # nobody gets such a fold by accident
        limited.fit_fold(study, fold, "name", SETTINGS)
    bad = Fold(0, np.r_[fold.learn, fold.test[:1]], fold.test)
    with pytest.raises(CxrError, match="two sides"):
        limited.fit_fold(study, bad, "name", SETTINGS.but(by="image"))


def test_experiments_and_variants_have_folders_of_their_own(study, monkeypatch):
    calls = []

    def fit_fold(study, fold, name, settings, **how):
        calls.append((name, settings, how))
        return None, []

    monkeypatch.setattr(limited, "fit_fold", fit_fold)
    found = limited.make_folds(study)
    assert {k: len(v) for k, v in limited.train_limited(study, found).items()} == {"un=0%": 2, "un=20%": 2}
    assert [how["share"] for *_, how in calls] == [0.0, 0.0, 0.2, 0.2]
    shares = list(limited.train_box_curve(study, found[0]))
    assert shares == [how["boxes"] for *_, how in calls[4:]] == sorted(shares) and shares[0] == 0 and 0.01 in shares
    variants = limited.train_ablations(study, found[0])
    calls, curve = calls[-len(variants) :], calls[: -len(variants)]
    assert len({name for name, *_ in calls + curve}) == len(calls + curve)
    own = study.settings.but(crf=False).model_dump()
    changes = [{k for k, v in s.model_dump().items() if v != own[k]} for _, s, _ in calls]
    asked = {"form"}, {"form", "lambda_ann"}, {"blur"}, {"lambda_ann"}, {"leash"}  # one thing at a time
    assert all(c in asked for c in changes) and all(c in changes for c in asked)


class Constant(torch.nn.Module):
    "Says the same number of every image."

    def __init__(self, number):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(float(number)))

    def forward(self, x):
        return Output(self.number.expand(len(x), 14), self.number.expand(len(x), 14, 8, 8))


@pytest.mark.parametrize("by", ["patient", "image"])
def test_each_image_is_predicted_by_the_network_of_its_own_fold(study, by):
    study = of(study, by=by, folds=3)
    found = limited.make_folds(study)
    test, valid = limited.predict_folds(study, found, [Constant(10 + fold.number) for fold in found])
    number = {row: 10 + fold.number for fold in found for row in fold.test.tolist()}
    assert sorted(test.rows) == study.split.test.tolist() and np.array_equal(valid.rows, study.split.valid)
    assert (test.logits == np.array([[number[r]] for r in test.rows.tolist()])).all() and (valid.logits == 10).all()
    assert np.array_equal(np.sort(test.map_rows), boxed_in(study, study.split.test))
    assert (test.maps == np.array([number[r] for r in test.map_rows.tolist()])[:, None, None, None]).all()


# killed where; which stages begin anew: the state is that of the step before, at a stage's first step from before `begin`
KILLS = [(("patches 2", 0, 2), ["crf"]), (("patches 2", 1, 1), ["crf"]), (("crf", 0, 1), ["crf"])]


def test_a_killed_run_goes_on_with_its_bounds(study, tmp_path, monkeypatch):
    s = SETTINGS.but(epochs=(4, 1), bounds=(0.001, 0.9, 0.1, 60), leash=1000, augment=dict(flip=0.5, shift=0.1))
    begun, begin, step = [], PatchNet.begin, Learner._step
    monkeypatch.setattr(studies, "Learner", partial(Learner, save_minutes=0))
    monkeypatch.setattr(PatchNet, "begin", lambda net, name, train: (begun.append(name), begin(net, name, train)))

    def train(name):
        here = dataclasses.replace(study, settings=s, run=Run(tmp_path / name, s))
        return limited.fit_fold(here, limited.make_folds(study)[1], "net", s, 0.4)

    whole, history = train("whole")
    assert begun == ["patches 1", "patches 2", "crf"] and [line["stage"] for line in history] == [*np.repeat(begun, (2, 2, 1))]
    assert (whole.bounds != torch.tensor(s.bounds)[:, None]).any(1).all()  # all four were fitted
    for kill, again in KILLS:

        def dying_step(learner, stage, *rest):
            step(learner, stage, *rest)
            if (stage.name, learner.now["epoch"], learner.now["step"]) == kill:
                raise RuntimeError("power cut")

        name = f"{kill}"
        with monkeypatch.context() as m, pytest.raises(RuntimeError, match="power cut"):
            m.setattr(Learner, "_step", dying_step)
            train(name)
        begun.clear()
        resumed, lines = train(name)
        assert begun == again and [line["valid_loss"] for line in lines] == [line["valid_loss"] for line in history]
        assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())
    assert torch.equal(train(name)[0].bounds, whole.bounds) and begun == again  # finished: only read


# ---------------------------------------------------------------- shifts


class Toy(torch.nn.Module):
    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, x):
        return Output(x.mean((1, 2, 3)), self.maps(x))


def test_what_moves_with_the_image_agrees_with_itself():
    images = torch.rand(3, 1, 40, 40)
    shifts = inspect.signature(limited.shift_agreement).parameters["shifts"].default
    assert [*shifts] == [*range(1, 9)]
    for maps in (lambda x: torch.full((len(x), 14, 5, 5), 0.3), lambda x: 9 * (x - 0.5).expand(-1, 14, -1, -1)):
        assert (limited.shift_agreement(Toy(maps), images) == 1).all()
    fixed = torch.randn(3, 14, 32, 32)
    values = limited.shift_agreement(Toy(lambda x: fixed), images, range(1, 9))
    assert values.shape == (8,) and (values < 0.9).all() and (values > 0).all()
    left, right = fixed.sigmoid()[..., :-3], fixed.sigmoid()[..., 3:]
    assert values[2] == pytest.approx((torch.minimum(left, right).sum() / torch.maximum(left, right).sum()).item())


def test_filters_raise_the_agreement_under_shifts(study):
    images = next(study.loader(study.split.test).epoch(0)).x
    values = {}
    for blur in (True, False):
        agreed = []
        for seed in range(6):
            torch.manual_seed(seed)
            net = PatchNet(SETTINGS.but(blur=blur)).train().view("unary")
            torch.nn.init.normal_(net.score.weight, std=0.5)
            net(images)  # statistics of its own kind of maps
            agreed.append(limited.shift_agreement(net.eval(), images))
        values[blur] = np.array(agreed)
    assert (values[True].mean(0) > values[False].mean(0)).all(), {k: v.mean(0).round(3) for k, v in values.items()}


# ---------------------------------------------------------------- the paper's size


@pytest.mark.slow
def test_both_stages_at_the_papers_size():
    torch.manual_seed(0)
    settings = LimitedSettings(weights=None)
    net, batch = PatchNet(settings, batch_of(50).y.numpy()), batch_of(2, 512)
    boxes = torch.zeros(2, 14, 20, 20)
    boxes[0, :3, 4:9, 5:11] = 1
    net.annotations = lambda batch: boxes
    stages = net.stages()
    assert [t.name for t in stages] == ["patches 1", "patches 2", "crf"] and stages[1].lr < stages[0].lr == 1e-3
    for stage in (stages[0], stages[-1]):
        learning = set_trainable(net, stage.trainable)
        opt = make_optimizer(stage, learning)
        train_mode(net)
        losses = net.loss(batch, stage.name)
        opt.zero_grad()
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"]) and losses["annotated"] > 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
        opt.step()
    with torch.no_grad():
        out = net.eval()(batch.x)
    assert out.maps.shape == (2, 14, 20, 20) and out.maps.isfinite().all() and len(FINDINGS) == out.logits.shape[1]
