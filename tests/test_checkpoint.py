"""A checkpoint is whole or it is not there."""

import os
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import load_checkpoint, save_checkpoint, write_atomically


def state(step: int) -> dict:
    return {"weights": torch.arange(5) + step, "progress": {"step": step, "scores": {"model": {"num_top1": 3}}}}


def silent(line: str) -> None:
    raise AssertionError(f"nothing should be said, but: {line}")


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    for step in (9, 10, 100):  # as text, 9 comes after 100
        save_checkpoint(tmp_path, step, state(step))
    assert load_checkpoint(tmp_path, silent)["progress"]["step"] == 100
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step_000000010.pt", "step_000000100.pt"]


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


def test_where_none_is_left_the_line_says_that_the_run_starts_anew(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step)).write_bytes(b"")
    lines = []
    assert load_checkpoint(tmp_path, lines.append) is None
    assert ["falling back" in line for line in lines] == [True, False]
    assert ["starts anew" in line for line in lines] == [False, True]


@pytest.mark.parametrize("num_kills", [1, 2])
@pytest.mark.parametrize("writes_done", [0, 1])
def test_a_kill_while_a_step_is_saved_again_leaves_its_old_checkpoint(tmp_path, monkeypatch, writes_done, num_kills):
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
