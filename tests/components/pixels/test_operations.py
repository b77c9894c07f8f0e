"""Every image gets its own operation, whatever the others get."""

import torch

from trainer.components.pixels.operations import OPERATIONS, operate

FILL = (124, 116, 104)


def parameters(batch):
    """One operation after the other, each with a small argument that all of them understand."""
    operation = torch.arange(len(batch)) % len(OPERATIONS)
    argument = torch.linspace(1, 3, len(batch), dtype=torch.float64).floor()
    return operation, argument, torch.arange(len(batch)) % 2 + 1


def test_grouping_changes_nothing(batch):
    operation, argument, interpolation = parameters(batch)
    together = operate(batch, operation, argument, interpolation, FILL)
    rows = [[row] for row in range(len(batch))]
    alone = [
        operate(batch[row], operation[row], argument[row], interpolation[row], FILL) for row in rows
    ]
    assert torch.equal(together, torch.cat(alone))


def test_order_in_the_batch_changes_nothing(batch):
    operation, argument, interpolation = parameters(batch)
    shuffled = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    together = operate(batch, operation, argument, interpolation, FILL)
    moved = operate(
        batch[shuffled], operation[shuffled], argument[shuffled], interpolation[shuffled], FILL
    )
    assert torch.equal(together[shuffled], moved)


def test_memory_format_changes_nothing(batch):
    drawn = parameters(batch)
    expected = operate(batch, *drawn, FILL)
    assert torch.equal(
        operate(batch.contiguous(memory_format=torch.channels_last), *drawn, FILL), expected
    )


def test_identity_is_first_and_input_is_kept(batch):
    before = batch.clone()
    assert OPERATIONS[0] == "identity"
    nothing = torch.zeros(len(batch), dtype=torch.int64)
    assert torch.equal(operate(batch, nothing, nothing.double(), nothing, FILL), batch)
    operate(batch, *parameters(batch), FILL)
    assert torch.equal(batch, before)


def test_large_images_are_taken_a_few_at_a_time():
    images = torch.randint(
        0, 256, (3, 3, 260, 260), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    operation = torch.full((3,), OPERATIONS.index("shear_x"))
    argument, interpolation = (
        torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        torch.tensor([1, 2, 1]),
    )
    together = operate(images, operation, argument, interpolation, FILL)
    assert torch.equal(
        together[2:], operate(images[2:], operation[2:], argument[2:], interpolation[2:], FILL)
    )
