"""Rows behind a URL: mirrored, put there whole, a wrong URL refused before anything runs."""

import fsspec
import pytest

from support.rows import ROW
from trainer.base.errors import UserError
from trainer.runs import remote_rows as row_urls
from trainer.runs.remote_rows import check_url, is_url, pull_rows, push_missing, push_row
from trainer.runs.results import read_row, store_row


@pytest.fixture
def url(request):
    url = f"memory://{request.node.name.replace('[', '-').replace(']', '')}"
    yield url
    system, root = fsspec.core.url_to_fs(url)
    system.rm(root, recursive=True) if system.exists(root) else None


def named(name: str):
    return ROW.model_copy(update={"run": name})


def test_rows_come_back_as_they_were_put(url, tmp_path):
    pull_rows(url, tmp_path / "rows")  # nothing is there yet
    for name in ("a-1", "b-1", "b-2"):
        push_row(url, named(name))
    pull_rows(url, tmp_path / "rows", ("b-",))
    assert sorted(path.stem for path in (tmp_path / "rows").iterdir()) == ["b-1", "b-2"]
    assert read_row(tmp_path, "b-2") == named("b-2")
    pull_rows(url, tmp_path / "rows")
    assert read_row(tmp_path, "a-1") == named("a-1")


def test_a_row_that_a_killed_process_left_behind_follows(url, tmp_path):
    push_row(url, named("a"))
    for name in ("a", "b"):
        store_row(tmp_path, named(name))
    push_missing(url, tmp_path / "rows")
    pull_rows(url, tmp_path / "other" / "rows")
    assert read_row(tmp_path / "other", "b") == named("b")


def test_a_store_that_cannot_be_opened_is_refused(url):
    check_url(url)
    with pytest.raises(UserError, match="results=nosuch://x: cannot be listed .*; use "):
        check_url("nosuch://x")


@pytest.mark.parametrize("num_errors", [2, 3])
def test_a_store_that_does_not_answer_is_asked_again(url, tmp_path, monkeypatch, num_errors):
    """Twice a network's error passes; the third time it is one line, and nothing is lost."""
    monkeypatch.setattr(row_urls, "WAITS_S", (0.0, 0.0))
    store_row(tmp_path, named("a"))
    left, listed = [num_errors], row_urls._names

    def names(asked):
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("reset by peer")
        return listed(asked)

    monkeypatch.setattr(row_urls, "_names", names)
    if num_errors == 3:
        with pytest.raises(
            UserError,
            match=(
                r"results=memory://.*: does not answer \(reset by peer\); rerun the same command to resume"
            ),
        ):
            push_missing(url, tmp_path / "rows")
    push_missing(url, tmp_path / "rows")
    pull_rows(url, tmp_path / "other" / "rows")
    assert read_row(tmp_path / "other", "a") == named("a")


def test_a_folder_is_no_url():
    assert is_url("s3://bucket/store") and not is_url("results") and not is_url("/a/b:c")
