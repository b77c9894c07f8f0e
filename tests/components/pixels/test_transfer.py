"""Small arrays reach the images' device as they are."""

import numpy as np
import pytest
import torch

from support.gpu_stub import host_waits
from trainer.components.pixels.operations import OPERATIONS, operate
from trainer.components.transfer import colour_on, on

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


def every_operation(batch):
    """What each operation in turn is asked to do to a batch."""
    operation = torch.arange(len(batch)) % len(OPERATIONS)
    strength = torch.ones(len(batch), dtype=torch.float64)
    return operation, strength, torch.arange(len(batch)) % 2 + 1, (1, 2, 3)


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does(batch):
    expected = operate(batch, *every_operation(batch))
    done = operate(batch.cuda(), *every_operation(batch))
    assert (done.cpu().int() - expected.int()).abs().max() <= 1


@pytest.mark.gpu_stub
def test_no_operation_waits_for_the_gpu(batch):
    images = batch.cuda()
    operate(images, *every_operation(batch))  # the first call copies the colour
    with host_waits() as waits:
        operate(images, *every_operation(batch))
    assert not waits


@pytest.mark.gpu_stub
@pytest.mark.parametrize("array", [np.arange(6), np.arange(6).reshape(2, 3).T, np.arange(6)[::2]])
def test_no_array_is_copied_from_ordinary_memory(array):
    with host_waits() as waits:
        on(torch.device("cuda"), array)
    assert not waits
