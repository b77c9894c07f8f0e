"""Which cores and GPUs are near each other, and which cores are a rank's own."""

import pytest

from support.numa import pretend
from trainer.base.cores import cores_each
from trainer.base.numa import UNKNOWN_NODE, list_of, node_cores, node_of, numbers_of


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", ()), ("3", (3,)), ("0-2,7,10-11", (0, 1, 2, 7, 10, 11)), ("0,2", (0, 2))],
)
def test_linuxs_short_list_of_numbers(text, numbers):
    assert numbers_of(f"{text}\n") == set(numbers) and list_of(numbers) == text


def test_nodes_are_those_with_cores_and_a_device_says_its_own(tmp_path):
    """A node may be a GPU's memory."""
    assert node_cores(tmp_path) == {} and node_of("0000:1b:00.0", tmp_path) is None
    gpus = {"0000:1b:00.0": 1, "0000:1c:00.0": -1}
    pretend(tmp_path, {0: "0-1,4-5", 1: "2-3", 2: ""}, gpus)
    assert node_cores(tmp_path) == {0: {0, 1, 4, 5}, 1: {2, 3}}
    assert node_of("0000:1b:00.0", tmp_path) == 1
    assert node_of("0000:1c:00.0", tmp_path) == UNKNOWN_NODE
    assert node_of("0000:1d:00.0", tmp_path) is None


NEAR, FAR = "0-31", "32-63"


@pytest.mark.parametrize(
    ("affinities", "group", "own"),
    [
        (["0-63"] * 8, None, [8] * 8),
        ([NEAR] * 4 + [FAR] * 4, None, [8] * 8),
        ([NEAR] * 2, None, [16] * 2),  # both GPUs on one node
        ([NEAR] * 3 + [FAR], None, [10] * 3 + [32]),
        (["0-7", "8-15", "32-39"], None, [8] * 3),  # cores of their own
        ([NEAR] * 4 + [FAR] * 4, 32.0, [4] * 8),  # a container's time is all ranks'
        (["0-7", "8-15"], 32.0, [8, 8]),
        (["0"] * 3, 0.5, [1] * 3),
    ],
)
def test_ranks_share_the_cores_that_they_have_in_common(monkeypatch, affinities, group, own):
    monkeypatch.setattr("trainer.base.cores.group_cores", lambda: group)
    found = [numbers_of(text) for text in affinities]
    assert [cores_each(found, rank) for rank in range(len(found))] == own
