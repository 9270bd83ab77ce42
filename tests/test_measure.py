"What the notebook of `measure` cannot say: threads, what is released inside, and a GPU where there is one."

import threading

import pytest
import torch

from cxr_book.measure import in_turns, peak_memory

MB = 2**20


def megabytes(n, device="cpu"):
    return torch.empty(n * MB // 4, device=device)


def climb(device):
    "4, 12, 8, 24, 16 MB: the peak is the fourth step."
    a, b = megabytes(4, device), megabytes(8, device)
    del a
    c = megabytes(16, device)
    del b
    return c


def test_the_peak_is_that_of_the_running_sum():
    assert peak_memory(lambda: climb("cpu")) == 24 * MB
    assert peak_memory(lambda: [climb("cpu") for _ in range(3)]) == 56 * MB  # two of 16 kept, and then 24 on top


def test_releasing_what_stood_before_does_not_count():
    held = [megabytes(32)]
    assert peak_memory(lambda: (held.clear(), megabytes(4))) == 4 * MB


def test_a_measurement_leaves_nothing_behind():
    assert [peak_memory(lambda: megabytes(8)) for _ in range(3)] == [8 * MB] * 3


def test_backward_and_its_hooks_are_watched():
    x = torch.ones(MB, requires_grad=True)
    grad = torch.ones(MB)
    y = x * 2

    def backward():
        hook = y.register_hook(lambda g: (megabytes(64), g)[1])
        out = torch.autograd.grad(y, x, grad, retain_graph=True)
        hook.remove()
        return out

    assert peak_memory(backward) in range(64 * MB, 68 * MB + 4096)


def test_another_thread_is_not_watched():
    def elsewhere():
        thread = threading.Thread(target=megabytes, args=[64])
        thread.start()
        thread.join()

    assert peak_memory(elsewhere) == 0


def test_an_error_comes_through_and_the_next_measurement_stands():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert peak_memory(lambda: megabytes(8)) == 8 * MB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    assert peak_memory(lambda: climb("cuda"), "cuda") == 24 * MB
    square = torch.rand(4096, 4096, device="cuda")
    rates = in_turns({"product": lambda: (square @ square, 1)[1]}, rounds=2, seconds=0.05, device="cuda")
    assert (rates["product"] < 2e4).all()  # 137 GFLOP each; without waiting it would be a launch
