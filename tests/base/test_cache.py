"""Where the cache is."""

import os
import pwd
import tempfile

from trainer.base.cache import cache_folder, cache_note, temporary_cache


def test_a_user_without_a_home_has_a_cache_of_its_own(tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    temporary_cache.cache_clear()
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert str(folder) in cache_note() and cache_folder() == folder
    temporary_cache.cache_clear()


def test_another_users_folder_is_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"rsb-{os.getuid()}").symlink_to(tmp_path)
    temporary_cache.cache_clear()
    assert temporary_cache() not in (tmp_path, tmp_path / f"rsb-{os.getuid()}")
    temporary_cache.cache_clear()


def test_a_user_with_a_home_keeps_caches_there_and_is_told_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "rsb" and not cache_note()
