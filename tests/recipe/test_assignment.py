"""Every image of a step is trained on by one rank, with its partner at hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.components.mixing import Mixup
from trainer.recipe.assignment import assignment


def mixes(partner):
    return Mixup(alpha=0.2, partner=partner) if partner else None


@given(
    number=st.integers(1, 6),
    world_size=st.integers(1, 12),
    num_units=st.integers(1, 4),
    num_images=st.integers(1, 90),
    partner=st.sampled_from([None, "reversed", "rolled"]),
)
def test_all_ranks_together_take_each_image_once(
    number, world_size, num_units, num_images, partner
):
    number = min(number, max(1, num_images // 2))  # as in an epoch's last step
    mix = mixes(partner)
    taken = []
    for rank in range(world_size):
        one = assignment(rank, world_size, number, mix, num_units)
        num_parts = one.parts_in(num_images, number)
        for micro_batch in one.micro_batches(num_images, number):
            size = len(range(micro_batch, num_images, number))
            if num_parts == 1:
                taken += range(micro_batch, num_images, number)
                continue
            part = one.rows(size)
            assert part.own_rows  # no rank of the group waits for images
            taken += (micro_batch + number * row for row in part.own_rows)
            for unit, loaded in part.units.items():
                rows, whole = part.rows[loaded], list(range(unit, size, num_units))
                for place, row in enumerate(rows):
                    other = rows[-1 - place] if partner == "reversed" else rows[place - 1]
                    theirs = (
                        whole[-1 - whole.index(row)]
                        if partner == "reversed"
                        else whole[whole.index(row) - 1]
                    )
                    assert partner is None or other == theirs or row not in part.own_rows
    assert sorted(taken) == list(range(num_images))


@pytest.mark.parametrize(
    ("number", "world_size", "found"),
    [(4, 8, (4, 2)), (4, 6, (2, 3)), (4, 3, (1, 3)), (4, 2, (2, 1)), (1, 8, (1, 8))],
)
def test_groups_are_as_many_as_can_share_the_micro_batches_evenly(number, world_size, found):
    one = assignment(world_size - 1, world_size, number, None, 1)
    assert (one.num_groups, one.num_parts) == found
    assert (one.group, one.part) == (found[0] - 1, found[1] - 1)


def test_parts_are_of_nearly_one_size_and_whole_units_where_there_are_enough():
    sizes = [
        len(assignment(rank, 3, 1, mixes("reversed"), 1).rows(512).own_rows) for rank in range(3)
    ]
    assert sum(sizes) == 512 and max(sizes) - min(sizes) <= 2
    for partner in ("reversed", "rolled"):
        one = assignment(5, 8, 1, mixes(partner), 8).rows(2048)
        assert one.rows == tuple(range(5, 2048, 8)) and not one.has_more
