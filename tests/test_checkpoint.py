"""A checkpoint is whole or it is not there."""

import os

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
