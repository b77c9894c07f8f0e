"""Small arrays reach the images' device as they are."""

import numpy as np
import pytest
import torch

from trainer.components.pixels.operations import OPERATIONS, operate
from trainer.components.pixels.transfer import colour_on, on

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "array", [np.arange(3), np.array([0.5, 1e-300]), np.zeros((2, 256), np.uint8)]
)
def test_values_and_dtype_stay(array):
    there = on(CPU, array)
    assert np.array_equal(there.numpy(), array) and there.numpy().dtype == array.dtype


def test_on_the_cpu_nothing_is_copied():
    array = np.zeros(2)
    on(CPU, array)[0] = 7
    assert array[0] == 7


def test_a_colour_is_one_byte_per_channel():
    colour = colour_on(CPU, (1, 2, 255))
    assert (
        colour.dtype == torch.uint8
        and colour.shape == (1, 3, 1, 1)
        and colour.flatten().tolist() == [1, 2, 255]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_operation_waits_for_the_gpu(batch):
    operation = torch.arange(len(batch)) % len(OPERATIONS)
    drawn = operation, torch.ones(len(batch), dtype=torch.float64), torch.arange(len(batch)) % 2 + 1
    expected = operate(batch, *drawn, (1, 2, 3))
    images = batch.cuda()
    operate(images, *drawn, (1, 2, 3))  # the first call copies the colour
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = operate(images, *drawn, (1, 2, 3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (done.cpu().int() - expected.int()).abs().max() <= 1
