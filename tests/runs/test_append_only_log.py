"""Whatever the disk refuses, and however often, in the end the file holds every byte once and in
order.
"""

import errno
import os
import random
import shutil

import pytest

from trainer.runs import append_only_log as kept_file
from trainer.runs.append_only_log import KeptFile


class Disk:
    """The calls that a file makes, some of which fail, and some of which write a part."""

    def __init__(self, patch, choose) -> None:
        self.choose = choose
        self.pwrite, self.fsync, self.opened = os.pwrite, os.fsync, os.open
        patch.setattr(kept_file.os, "pwrite", self._pwrite)
        patch.setattr(kept_file.os, "fsync", self._fsync)
        patch.setattr(kept_file.os, "open", self._open)

    def _fail(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _pwrite(self, descriptor, content, place):
        how = self.choose()
        if how == "fail":
            self._fail()
        if how == "part":
            return self.pwrite(descriptor, content[: max(1, len(content) // 3)], place)
        return self.pwrite(descriptor, content, place)

    def _fsync(self, descriptor):
        if self.choose() == "fail":
            # what the kernel does: pages that it could not write are dropped, and are not there
            # when read back
            os.ftruncate(descriptor, max(self.file._num_done, os.fstat(descriptor).st_size - 5))
            self._fail()
        self.fsync(descriptor)

    def _open(self, path, *given):
        if self.choose() == "fail":
            self._fail()
        return self.opened(path, *given)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_or_doubled_whatever_fails(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(patch, lambda: "well")
        file = disk.file = KeptFile(folder / "metrics.jsonl", 0, is_safe=True)
        disk.choose = lambda: draw.choice(["well", "fail", "part"])
        expected = b""
        for number in range(80):
            line = b'{"step": %d}\n' % number
            expected += line
            file.write(line)
            assert file.num_bytes == len(expected)
            what = draw.random()
            if what < 0.2:
                try:
                    file.sync()
                except OSError:
                    assert file.error is not None
            elif what < 0.25:
                shutil.rmtree(folder, ignore_errors=True)
            elif what < 0.3:
                (folder / "metrics.jsonl").unlink(missing_ok=True)
        disk.choose = lambda: "well"
        file.sync()
        assert (folder / "metrics.jsonl").read_bytes() == expected
        file.close()
    assert file.error is None and file.unwritten is None


def test_what_is_synced_is_on_the_disk_or_an_error(tmp_path, monkeypatch):
    file = KeptFile(tmp_path / "lines", 0, is_safe=True)
    file.write(b"one\n")
    file.sync()
    with monkeypatch.context() as patch:
        Disk(patch, lambda: "fail")
        file.write(b"two\n")
        assert file.error.errno == errno.ENOSPC and (tmp_path / "lines").read_bytes() == b"one\n"
        with pytest.raises(OSError, match="No space"):
            file.sync()
        file.close()
    assert file.unwritten == b"one\ntwo\n"


def test_a_removed_folder_is_made_again_with_all_that_stood_in_the_file(tmp_path):
    path = tmp_path / "run" / "lines"
    path.parent.mkdir()
    path.write_bytes(b"from a process before\n")
    file = KeptFile(path)
    file.write(b"one\n")
    shutil.rmtree(path.parent)
    file.write(b"two\n")
    assert file.error is None and path.read_bytes() == b"from a process before\none\ntwo\n"
    os.rename(
        path.parent, tmp_path / "away"
    )  # as a network folder that comes back: first another, then the old one
    file.write(b"three\n")
    shutil.rmtree(path.parent)
    os.rename(tmp_path / "away", path.parent)
    file.write(b"four\n")
    assert path.read_bytes() == b"from a process before\none\ntwo\nthree\nfour\n"


def test_what_stands_behind_the_counted_bytes_is_cut_away(tmp_path):
    (tmp_path / "lines").write_bytes(b"one\ntwo\nthr")
    KeptFile(tmp_path / "lines", 4).close()
    assert (tmp_path / "lines").read_bytes() == b"one\n"


def test_writers_do_not_wait_for_the_disk_that_syncs(tmp_path, monkeypatch):
    import threading

    file = KeptFile(tmp_path / "lines", 0, is_safe=True)
    file.write(b"one\n")
    is_syncing, may_end = threading.Event(), threading.Event()

    def slow(descriptor):
        is_syncing.set()
        assert may_end.wait(10)

    monkeypatch.setattr(kept_file.os, "fsync", slow)
    thread = threading.Thread(target=file.sync)
    thread.start()
    assert is_syncing.wait(10)
    file.write(b"two\n")
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"
    may_end.set()
    thread.join()
    assert bytes(file._kept) == b"two\n"  # came after what was synced: still to be kept
    file.close()
