"""A checkpoint is whole or it is not there."""

import contextlib
import errno
import io
import os
import random
import tracemalloc
from pathlib import Path

import pytest
import torch

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.runs import checkpoint
from trainer.runs.checkpoint import load_checkpoint, remove_unfinished, save_checkpoint


def state(step: int) -> dict:
    return {
        "weights": torch.arange(5) + step,
        "progress": {"step": step, "scores": {"model": {"num_top1": 3}}},
    }


def silent(line: str) -> None:
    raise AssertionError(f"nothing should be said, but: {line}")


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    for step in (9, 10, 100):  # as text, 9 comes after 100
        save_checkpoint(tmp_path, step, state(step))
    assert load_checkpoint(tmp_path, silent)["progress"]["step"] == 100
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "step_000000010.pt",
        "step_000000100.pt",
    ]


def test_an_empty_folder_has_none(tmp_path):
    assert load_checkpoint(tmp_path / "nothing", silent) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "checksum", "no_checksum"])
def test_a_damaged_one_falls_back_with_a_line(tmp_path, damage):
    save_checkpoint(tmp_path, 1, state(1))
    path = save_checkpoint(tmp_path, 2, state(2))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "checksum":
        path.with_suffix(".sha256").write_text("0" * 64)
    else:
        path.with_suffix(".sha256").unlink()
    lines = []
    assert load_checkpoint(tmp_path, lines.append)["progress"]["step"] == 1
    assert len(lines) == 1 and "step_000000002.pt" in lines[0] and "damaged" in lines[0]
    assert "falling back to the one before it" in lines[0]


@pytest.mark.parametrize("reader", ["hashlib.file_digest", "torch.load"])
def test_one_that_the_disk_does_not_give_is_not_passed_over(tmp_path, monkeypatch, reader):
    """A network's disk may give it a minute later: whoever went on from the one before, or again,
    would delete it.
    """
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step))

    def failing(*given, **named):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(reader, failing)
        with pytest.raises(
            UserError,
            match=(
                r"step_000000002.pt: cannot be read \(Input/output error\); rerun the"
                r" same command to resume"
            ),
        ):
            load_checkpoint(tmp_path, silent)
    assert load_checkpoint(tmp_path, silent)["progress"]["step"] == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_the_disk_does_not_show_is_no_empty_one(tmp_path, monkeypatch, number):
    save_checkpoint(tmp_path, 1, state(1))

    def failing(*given):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir", "stat"):
            patch.setattr(os, name, failing)
        with pytest.raises(
            UserError,
            match=rf"cannot be read \({os.strerror(number)}\); rerun the same command to resume",
        ):
            load_checkpoint(tmp_path, silent)
    assert load_checkpoint(tmp_path, silent)["progress"]["step"] == 1
    assert load_checkpoint(tmp_path / "none", silent) is None


@pytest.mark.parametrize("seed", range(50))
def test_cut_or_flipped_at_any_place_it_is_found_and_the_one_before_it_used(tmp_path, seed):
    save_checkpoint(tmp_path, 1, state(1))
    path = save_checkpoint(tmp_path, 2, state(2))
    draw, content = random.Random(seed), bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if seed % 2:
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    lines = []
    assert load_checkpoint(tmp_path, lines.append)["progress"]["step"] == 1
    assert len(lines) == 1 and "step_000000002.pt is damaged" in lines[0]
    # the run goes on from step 1: what is damaged is no "last but one" of the checkpoints that come
    save_checkpoint(tmp_path, 1, state(1))
    assert [path.name for path in tmp_path.glob("*.pt")] == ["step_000000001.pt"]


def test_what_is_to_stay_stays_beside_the_last_two(tmp_path):
    for step in range(1, 11):
        save_checkpoint(tmp_path, step, state(step), is_kept=step % 4 == 0)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        f"step_{step:09d}.pt" for step in (4, 8, 9, 10)
    ]
    for step in (9, 10):
        (tmp_path / f"step_{step:09d}.pt").write_bytes(b"")
    assert load_checkpoint(tmp_path, lambda line: None)["progress"]["step"] == 8
    for step in (11, 12, 13):  # by a later call, which keeps others or none
        save_checkpoint(tmp_path, step, state(step))
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        f"step_{step:09d}.pt" for step in (4, 8, 12, 13)
    ]
    assert len(list(tmp_path.glob("*.sha256"))) == 4


@pytest.mark.parametrize("num_bytes", [0, 1, 700, 1500])
def test_a_disk_that_is_full_in_the_middle_keeps_what_was_there_and_nothing_half_written(
    tmp_path, monkeypatch, num_bytes
):
    save_checkpoint(tmp_path, 1, state(1))
    before = sorted(path.name for path in tmp_path.iterdir())
    room = {"left": num_bytes}

    class Full(io.FileIO):
        def write(self, content):
            if room["left"] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = bytes(content)[: room["left"]]
            room["left"] -= len(taken)
            return super().write(taken)

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "open", lambda path, mode, buffering=-1: Full(path, mode), raising=False
        )
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, 2, state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert load_checkpoint(tmp_path, silent)["progress"]["step"] == 1


def test_it_is_written_without_a_copy_of_it_in_memory(tmp_path):
    tracemalloc.start()
    save_checkpoint(
        tmp_path, 1, {"weights": torch.zeros(4_000_000)}
    )  # tensors themselves are not counted
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "step_000000001.pt").stat().st_size > 16_000_000 > 8 * most_bytes


def test_where_none_is_left_the_line_says_that_the_run_starts_anew(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step)).write_bytes(b"")
    lines = []
    assert load_checkpoint(tmp_path, lines.append) is None
    assert ["falling back" in line for line in lines] == [True, False]
    assert ["starts again" in line for line in lines] == [False, True]


@pytest.mark.parametrize("num_kills", [1, 2])
@pytest.mark.parametrize("writes_done", [0, 1])
def test_a_kill_while_a_step_is_saved_again_leaves_its_old_checkpoint(
    tmp_path, monkeypatch, writes_done, num_kills
):
    save_checkpoint(tmp_path, 1, state(5))
    for kill in range(num_kills):
        with monkeypatch.context() as patch:
            die_after(patch, writes_done)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(tmp_path, 1, state(6 + kill))
        assert load_checkpoint(tmp_path, silent)["progress"]["step"] == 5
    save_checkpoint(tmp_path, 1, state(9))
    assert load_checkpoint(tmp_path, silent)["progress"]["step"] == 9


def test_what_a_kill_left_half_written_goes_with_the_next_save(tmp_path, monkeypatch):
    others = tmp_path / ".row.json.7.part"
    others.touch()
    with monkeypatch.context() as patch:
        die_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 1, state(1))
    assert len(list(tmp_path.glob(".step_*.part"))) == 1
    save_checkpoint(tmp_path, 2, state(2))
    assert not list(tmp_path.glob(".step_*.part")) and others.exists()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [
        "step_000000002.pt",
        "step_000000002.sha256",
    ]


def test_what_a_kill_left_half_written_in_a_run_folder_goes(tmp_path):
    for name in (
        ".model.safetensors.7.part",
        ".plan.json.8.part",
        ".claim.a.9.b.part",
        "row.json",
        "notes.part",
    ):
        (tmp_path / name).write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".claim.a.9.b.part",
        "row.json",
        "notes.part",
    }  # another may be about to claim


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_kill_while_an_old_one_is_removed_leaves_nothing_of_it_behind(
    tmp_path, monkeypatch, removed
):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step))
    unlink, done = Path.unlink, []

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        if len(done) == removed:
            raise KeyboardInterrupt
        done.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlinking)
        save_checkpoint(tmp_path, 3, state(3))
    assert len(done) == removed and load_checkpoint(tmp_path, silent)["progress"]["step"] == 3
    save_checkpoint(tmp_path, 4, state(4))
    assert (
        sorted(path.stem for path in tmp_path.glob("step_*"))
        == ["step_000000003"] * 2 + ["step_000000004"] * 2
    )


def die_after(patch, writes_done: int) -> None:
    """Die where the next file but `writes_done` would get its name."""
    replace, done = os.replace, []

    def replacing(source: Path, target: Path) -> None:
        if len(done) == writes_done:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    patch.setattr(os, "replace", replacing)


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    write_atomically(path, b"old")

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_the_file_opens_with_weights_only_in_plain_torch(tmp_path):
    path = save_checkpoint(tmp_path, 3, state(3))
    assert torch.load(path, weights_only=True)["weights"].tolist() == [3, 4, 5, 6, 7]
