"""Files that are written whole: what an interrupt leaves, links and permissions."""

from __future__ import annotations

import errno
import os
import stat
import sys

import pytest

from softsphere.whole_files import write_bytes

posix = pytest.mark.skipif(
    sys.platform == "win32", reason="permissions and links are those of POSIX"
)


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "a.pt"
    for content in (b"old", b"new"):
        write_bytes(path, content)
        assert path.read_bytes() == content
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_an_interrupt_leaves_the_old_file_alone(tmp_path, monkeypatch, when):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch, when):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, when, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_bytes(tmp_path / "a.pt", b"new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.pt"))


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "a.pt", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o666 & ~umask


@posix
def test_an_old_file_keeps_its_permissions_and_a_link_stays(tmp_path):
    path, link = tmp_path / "a.pt", tmp_path / "link.pt"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_bytes(link, b"new")
    assert link.is_symlink() and path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder to write into.*missing.a\.pt"):
        write_bytes(tmp_path / "missing" / "a.pt", b"")
