"The segmentation brick beyond its notebook: any shape, any mask, resuming, and side by side with plain sums."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_book.core import CxrError
from cxr_book.data import read
from cxr_book.phantom import PhantomSettings, draw_dataset
from cxr_book.segmentation import (
    Randomise,
    SegmentationSettings,
    Segmenter,
    UNet,
    cardiothoracic_ratio,
    dice,
    dice_loss,
    fit_segmenter,
    iou,
    largest_piece,
    mask_loader,
    randomise,
    segment,
    soft_dice,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return read(draw_dataset(PhantomSettings(n_images=40, size=64, seed=2), folder / "set", workers=1))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_dice_is_bounded_symmetric_and_one_on_itself(seed, p, q):
    rng = np.random.default_rng(seed)
    a, b = rng.random((3, 9, 7)) < p, rng.random((3, 9, 7)) < q
    d = dice(a, b)
    assert ((0 <= d) & (d <= 1)).all() and np.array_equal(d, dice(b, a)) and (dice(a, a) == 1).all()
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    assert np.allclose(iou(a, b), np.where(either > 0, both / np.maximum(either, 1), 1))
    soft = soft_dice(torch.from_numpy(a).double(), torch.from_numpy(b).double(), smooth=1e-9)
    assert np.allclose(soft, d, atol=1e-6)


@pytest.mark.parametrize("fill", (0.0, 1.0))
@pytest.mark.parametrize("logit", (-60.0, 0.0, 60.0))
def test_loss_and_gradient_are_finite_at_the_limits(fill, logit):
    z = torch.full((2, 3, 8, 8), logit, requires_grad=True)
    loss = dice_loss(z, torch.full_like(z, fill))
    loss.backward()
    assert 0 <= loss <= 1 and z.grad.isfinite().all()


def test_half_precision_logits_give_a_float32_loss():
    z, masks = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 64, 64).round()
    half = dice_loss(z.bfloat16(), masks)
    assert half.dtype == torch.float32 and abs(half - dice_loss(z, masks)) < 1e-2


@pytest.mark.parametrize("norm", ("group", "batch"))
@pytest.mark.parametrize("depth,size", ((1, (34, 18)), (3, (64, 40)), (4, (32, 32))))
def test_unet_keeps_the_frame(norm, depth, size):
    net = UNet(4, width=4, depth=depth, norm=norm)
    z = net(torch.rand(2, 1, *size))
    assert z.shape == (2, 4, *size)
    z.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("x", (torch.rand(1, 1, 30, 32), torch.rand(1, 3, 32, 32), torch.rand(32, 32)))
def test_unet_refuses_what_does_not_fit(x):
    with pytest.raises(CxrError, match="multiple of 8"):
        UNet(depth=3)(x)


def test_group_norm_lets_no_image_touch_another():
    net, x = UNet(2, width=8, depth=2), torch.rand(3, 1, 32, 32)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-5)


def test_looks_stay_in_range_and_are_repeatable():
    x = torch.rand(4, 1, 48, 40)
    x[0] = 0
    torch.manual_seed(3)
    a = randomise(x, Randomise())
    torch.manual_seed(3)
    assert torch.equal(a, randomise(x, Randomise())) and a.isfinite().all() and a.min() >= 0 and a.max() <= 1


def test_ratio_ignores_crumbs_and_names_what_is_missing():
    left, right, heart = (np.zeros((30, 30), bool) for _ in range(3))
    left[5:25, 18:28], right[5:25, 2:12], heart[15:24, 10:20] = True, True, True
    assert cardiothoracic_ratio(left, right, heart) == 10 / 26
    left[0, 29] = True
    assert largest_piece(left).sum() == 200 and cardiothoracic_ratio(left, right, heart) == 10 / 26
    assert np.isnan(cardiothoracic_ratio(left, np.zeros_like(right), heart))


def test_a_stopped_training_goes_on_to_the_same_weights(drawn, tmp_path):
    settings = SegmentationSettings.from_preset("smoke", epochs=2, batch_size=8)
    whole, _ = fit_segmenter(drawn, settings, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(self, batch, stage):
        if self.training and Stopping.left == 0:
            raise Stop
        Stopping.left -= self.training
        return Segmenter.loss_(self, batch, stage)

    class Stopping:
        left = 4  # batches: within the second epoch

    Segmenter.loss_ = Segmenter.loss
    try:
        Segmenter.loss = stop
        with pytest.raises(Stop):
            fit_segmenter(drawn, settings, tmp_path / "part")
    finally:
        Segmenter.loss = Segmenter.loss_
        del Segmenter.loss_
    again, _ = fit_segmenter(drawn, settings, tmp_path / "part")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_masks_of_the_loader_are_those_that_are_measured(drawn):
    settings = SegmentationSettings.from_preset("smoke")
    loader = mask_loader(drawn, None, settings)
    found, truth = segment(Segmenter(settings), loader)
    assert found.shape == truth.shape == (40, 3, 64, 64)
    assert 0.1 < truth[:, :2].any(1).mean() < 0.7


@pytest.mark.slow
def test_unseen_drawn_patients(tmp_path):
    "What chapter 14 relies on: lungs at least 0.95, heart at least 0.90."
    data = read(draw_dataset(PhantomSettings(n_images=500, size=64, seed=9), tmp_path / "set", workers=1))
    settings = SegmentationSettings(image_size=64)
    method, _ = fit_segmenter(data, settings, tmp_path / "run")
    left, right, heart = dice(*segment(method, mask_loader(data, data.lists["test"], settings))).mean(0)
    assert min(left, right) >= 0.95 and heart >= 0.90
