"""Any number of ranks makes the same run; one that ends otherwise ends all, by name."""

import time

import pytest
import torch

from support import ranked
from support.pieced import relative
from support.ranked import end_of, on_ranks
from trainer.distributed import rendezvous
from trainer.distributed.communicator import alone
from trainer.distributed.gradients import Gradients

# BatchNorm, mixing, repeats, LAMB, an average, a last step of 29 images
# Smooth: where max pooling meets a tie, as on a plain background, the last bit decides where a
# gradient goes.
SMOOTH = "'model={stem: {name: patchify, patch_px: 4}, activation: {name: silu}}' lr.peak=5e-4 "
EVERYTHING = (
    SMOOTH
    + "batch.images=32 batch.norm_images=8 batch.drop_last=false average='{name: ema, decay: 0.9,"
    " every_steps: 1}'"
)
# a last step of 5 images: 2 micro-batches, of 3 and of 2 images, so that two of four ranks have
# none
SMALL_LAST = "batch.images=8 batch.norm_images=2 batch.drop_last=false"


pytestmark = pytest.mark.drill  # minutes in all: `make drill`


@pytest.fixture(scope="module", autouse=True)
def _forked_from():
    """The process that ranks are forked from has imported all of it: what is timed is the ranks."""
    on_ranks(ranked.agreements, 2)


def test_one_process_agrees_with_itself_and_waits_for_nobody():
    assert ranked.agreements(alone()) == {
        "sum": [1, 1, 1], "total": 1, "most": 0, "any": (False, False, True), "same": (True, True),
        "broadcast": {"name": "run", "numbers": [1, 2.5, None], "tensor": pytest.approx(torch.arange(3))},
        "copy": [0, 0], "share": list(range(10)),
    }  # fmt: skip
    weight = torch.nn.Parameter(torch.ones(2))
    gradients = Gradients([weight], alone())
    gradients.start()
    assert weight.grad is None and not weight._post_accumulate_grad_hooks


def test_ranks_agree():
    found = on_ranks(ranked.agreements, 3)
    for rank, answers in enumerate(found):
        assert answers["sum"] == [6, 6, 6] and answers["total"] == 6 and answers["most"] == 0
        assert answers["any"] == (False, True, True) and answers["same"] == (True, False)
        assert answers["broadcast"]["numbers"] == [1, 2.5, None] and answers["broadcast"][
            "tensor"
        ].tolist() == [0, 1, 2]
        assert answers["copy"] == [0, 0] and answers["share"] == list(range(rank, 10, 3))


def largest(found: dict, expected: dict) -> float:
    return max(
        (found[name].double() - other.double()).abs().max().item()
        for name, other in expected.items()
    )


def in_order(found: list[dict]) -> list:
    return sorted(batch for rank in found for batch in rank["ids"])


@pytest.fixture(scope="module")
def one_rank():
    return on_ranks(ranked.steps, 1, "A1", "test_resnet", EVERYTHING, -10, 20)[0]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_and_accumulated_micro_batches_are_interchangeable(one_rank, num_ranks):
    found = on_ranks(ranked.steps, num_ranks, "A1", "test_resnet", EVERYTHING, -10, 20)
    assert in_order(found) == one_rank["ids"] and len(one_rank["ids"]) == 80
    assert {len(ids) for _, _, ids in one_rank["ids"]} == {
        7,
        8,
    }  # the last step of the epoch is in it
    for rank in found:
        assert rank["lrs"] == one_rank["lrs"]
        assert rank["losses"] == pytest.approx(one_rank["losses"], rel=1e-5)
        assert relative(rank["weights"], one_rank["weights"]) < 1e-5
        assert relative(rank["average"], one_rank["average"]) < 1e-5
        assert largest(rank["buffers"], one_rank["buffers"]) < 1e-6
        for kind in ("weights", "buffers", "average", "gradients"):
            assert all(
                torch.equal(tensor, found[0][kind][name]) for name, tensor in rank[kind].items()
            )


def test_in_float64_ranks_differ_in_the_last_digits_alone():
    """What float32 shows as 1e-6 after many steps is rounding: nothing is weighted or counted
    otherwise.
    """
    words = ("A1", "test_resnet", EVERYTHING, -3, 6)
    expected = on_ranks(ranked.steps64, 1, *words)[0]
    for rank in on_ranks(ranked.steps64, 4, *words):
        for kind in ("weights", "average", "buffers", "gradients"):
            assert relative(rank[kind], expected[kind]) < 1e-12


def test_without_statistics_over_images_ranks_differ_by_rounding_alone():
    words = (
        "A2",
        "test_resnet",
        EVERYTHING.replace("stem:", "norm: {name: group_norm, groups: 4, eps: 1e-5}, stem:"),
        -10,
        20,
    )
    expected = on_ranks(ranked.steps, 1, *words)[0]
    for num_ranks in (2, 4):
        for rank in on_ranks(ranked.steps, num_ranks, *words):
            assert relative(rank["weights"], expected["weights"]) < 1e-6


@pytest.mark.parametrize(("num_ranks", "norm_images"), [(1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_is_that_of_the_whole_step_in_one_piece(num_ranks, norm_images, last):
    """A model without norms over images; the last step has micro-batches of 3 and of 2 images, on
    two of four ranks.
    """
    page = ("torchvision-v1", "test_convnext")
    first = -1 if last else 0
    whole = on_ranks(
        ranked.steps, 1, *page, "batch.images=8 batch.norm_images=8 batch.drop_last=false", first, 1
    )[0]
    cut = on_ranks(
        ranked.steps,
        num_ranks,
        *page,
        f"batch.images=8 batch.norm_images={norm_images} batch.drop_last=false",
        first,
        1,
    )
    assert sum(len(rank["ids"]) for rank in cut) == (2 if last else 4)
    assert [len(rank["ids"]) for rank in cut].count(0) == (2 if last and num_ranks == 4 else 0)
    scale = max(gradient.abs().max().item() for gradient in whole["gradients"].values())
    for rank in cut:
        assert largest(rank["gradients"], whole["gradients"]) < 1e-6 * scale


@pytest.mark.parametrize(
    "norm",
    [
        "",
        (
            "'model={norm: {name: batch_channel_norm, groups: 4, eps: 1e-5, momentum: 0.1,"
            " statistics: estimated}}'"
        ),
    ],
    ids=["batch_norm", "estimated"],
)
def test_running_statistics_count_every_micro_batch_once_where_a_rank_has_none(norm):
    words = ("torchvision-v1", "test_resnet", f"{SMALL_LAST} lr.peak=1e-9 {norm}", -2, 3)
    expected = on_ranks(ranked.steps, 1, *words)[0]
    for rank in on_ranks(ranked.steps, 4, *words):
        assert largest(rank["buffers"], expected["buffers"]) < 1e-6


def test_any_number_of_ranks_counts_the_same_images():
    expected = on_ranks(ranked.scores, 1, 10)[0]
    assert expected[2] == 10
    for num_ranks in (2, 3):
        for found in on_ranks(ranked.scores, num_ranks, 10):
            assert found[:3] == expected[:3]
            assert found[3] == pytest.approx(expected[3], abs=1e-12)


RUN = (
    SMOOTH + "batch.images=128 batch.norm_images=16 epochs=2 average='{name: ema, decay: 0.9,"
    " every_steps: 2}'"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return on_ranks(ranked.whole_run, 1, str(tmp_path_factory.mktemp("undisturbed")), RUN)[0]


@pytest.mark.parametrize(("num_before", "num_after"), [(2, 1), (2, 4), (4, 2), (4, 8)])
def test_stopped_on_two_or_four_ranks_it_goes_on_on_any_number(
    undisturbed, tmp_path, num_before, num_after
):
    stopped = on_ranks(
        ranked.whole_run, num_before, str(tmp_path), RUN, 1, 9
    )  # the signal comes to rank 1 alone
    assert [(rank["status"], rank["step"]) for rank in stopped] == [("stopped", 9)] * num_before
    assert (
        "stopped by SIGUSR1 after step 9: saved" in stopped[0]["said"] and stopped[1]["said"] == ""
    )
    ended = on_ranks(ranked.whole_run, num_after, str(tmp_path), RUN)
    for rank in ended:
        assert (rank["status"], rank["step"]) == ("finished", 22)
        assert relative(rank["weights"], undisturbed["weights"]) < 1e-5
        assert relative(rank["average"], undisturbed["average"]) < 1e-5
        for which, expected in undisturbed["scores"].items():
            assert rank["scores"][which]["num_top1"] == expected["num_top1"]
    assert ended[0]["changes"] == [f"ranks {num_before} -> {num_after} after step 9"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert (
        sum('"loss_nats"' in line and '"lr"' in line for line in lines) == 4
    )  # one writer, nothing twice


def test_a_loss_that_is_no_number_on_one_rank_ends_all_as_diverged(tmp_path):
    found = on_ranks(ranked.diverging, 2, str(tmp_path), 1)
    assert [(rank["status"], rank["step"]) for rank in found] == [("diverged", 10)] * 2
    assert "diverged: the training loss is nan" in found[0]["said"]


@pytest.mark.parametrize("stop_rank", [0, 2])
def test_a_signal_during_evaluation_ends_it_on_all_ranks(stop_rank):
    assert on_ranks(ranked.stopped_in_evaluation, 3, stop_rank) == ["stopped"] * 3


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize(("how", "code"), [("raise", 1), ("user", 2), ("interrupt", 130)])
def test_an_error_on_one_rank_ends_all_with_that_error_first(how, code, bad_rank):
    began_s = time.monotonic()
    ended = end_of(ranked.failing, 3, how, bad_rank)
    assert time.monotonic() - began_s < 40
    others = [rank for number, rank in enumerate(ended) if number != bad_rank]
    assert {rank.code for rank in others} == {code}
    assert not any("error" in rank.text.lower() for rank in others), [rank.text for rank in others]
    if how == "raise":
        assert (
            f"rank {bad_rank} of 3 on" in ended[bad_rank].text
            and "ZeroDivisionError: a mistake of ours" in ended[bad_rank].text
        )
    assert (
        ended[bad_rank].code == 1
    )  # of the exception itself, which the command line turns into its code


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_killed_rank_is_named_by_one_of_those_left(bad_rank):
    began_s = time.monotonic()
    ended = end_of(ranked.failing, 3, "kill", bad_rank)
    assert time.monotonic() - began_s < 40
    assert ended[bad_rank].code == -9
    left = [rank for number, rank in enumerate(ended) if number != bad_rank]
    assert {rank.code for rank in left} == {1}
    said = "".join(rank.text for rank in left)
    named = "rank 0, which keeps" if bad_rank == 0 else f"rank {bad_rank} (process"
    assert (
        named in said and "no longer answers" in said and "rerun the same command to resume" in said
    )
    assert "Traceback" not in said


@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_does_not_come_is_named(missing):
    assert rendezvous.COME_S == 20
    began_s = time.monotonic()
    ended = end_of(ranked.agreements, 3, come={0, 1, 2} - {missing}, come_s=2)
    assert time.monotonic() - began_s < 22  # 40 with the 20 that it really waits
    assert {rank.code for rank in ended} == {1}
    said = "".join(rank.text for rank in ended)
    assert (
        "rank 0 did not come" if missing == 0 else "rank 2 of 3 did not come within 2 s"
    ) in said
    assert "Traceback" not in said


def test_rank_0_says_who_came():
    ended = end_of(ranked.agreements, 2)
    assert [line.split()[:2] for line in ended[0].text.splitlines() if line.startswith("rank")] == [
        ["rank", "0"],
        ["rank", "1"],
    ]
    assert "process" in ended[0].text and "cpu" in ended[0].text and ended[1].text == ""
