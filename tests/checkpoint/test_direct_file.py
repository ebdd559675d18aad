"""Files that are written past the page cache: whatever their size, whatever the file system makes of it."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmscale.checkpoint import direct_file as module
from mmscale.checkpoint.direct_file import ALIGNMENT, BUFFER_BYTES, direct_file

SIZES = [0, 1, ALIGNMENT - 1, ALIGNMENT, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 4 * BUFFER_BYTES + 5 * ALIGNMENT + 7]


def write(path: Path, content: bytes, step: int) -> tuple[int, str]:
    with direct_file(path) as file:
        memory = bytearray(step)
        for at in range(0, len(content), step):
            part = content[at : at + step]
            memory[: len(part)] = part
            file.write(memoryview(memory)[: len(part)])  # the same memory again and again
        return file.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [100_003, 3 * BUFFER_BYTES])
def test_what_was_written_is_there_and_hashed(tmp_path: Path, size: int, step: int) -> None:
    content = os.urandom(size)
    assert write(tmp_path / "f", content, step) == (size, hashlib.sha256(content).hexdigest())
    assert (tmp_path / "f").read_bytes() == content
    with pytest.raises(FileExistsError):
        write(tmp_path / "f", content, step)


@pytest.mark.parametrize("refusal", ["open", "write", "half"])
def test_file_systems_that_refuse_direct_writes(tmp_path: Path, refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, at the first write, or after a write of a part of a block."""
    really_open, really_write, refused = os.open, os.write, []

    def refuse() -> None:
        refused.append(True)
        raise OSError(errno.EINVAL, "Invalid argument")

    def opened(path, flags, mode=0o777, *, dir_fd=None):  # type: ignore[no-untyped-def]
        if refusal == "open" and flags & os.O_DIRECT:
            os.close(really_open(path, flags & ~os.O_DIRECT, mode, dir_fd=dir_fd))  # as ramfs does: the file is made all the same
            refuse()
        return really_open(path, flags, mode, dir_fd=dir_fd)

    def written(descriptor: int, content: memoryview) -> int:
        if refusal == "open" or not module._is_direct(descriptor):
            return really_write(descriptor, content)
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        if refusal == "write" or at % ALIGNMENT:
            refuse()
        module._make_plain(descriptor)
        count = really_write(descriptor, content[: BUFFER_BYTES // 2 + 100] if at == BUFFER_BYTES else content)
        module.fcntl.fcntl(descriptor, module.fcntl.F_SETFL, module.fcntl.fcntl(descriptor, module.fcntl.F_GETFL) | os.O_DIRECT)
        return count

    content = os.urandom(3 * BUFFER_BYTES + 12_345)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "write", written)
        found = write(tmp_path / "f", content, 1_000_003)
    assert refused == [True]
    assert found == (len(content), hashlib.sha256(content).hexdigest())
    assert (tmp_path / "f").read_bytes() == content


@pytest.fixture
def _limit() -> Iterator[None]:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("_limit")
@pytest.mark.parametrize("largest", [0, 5000, BUFFER_BYTES + 4096, 2 * BUFFER_BYTES + 77])
def test_a_write_that_fails_is_an_error_of_the_caller(tmp_path: Path, largest: int) -> None:
    """The kernel takes what fits and refuses the rest."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "f", bytes(5 * BUFFER_BYTES), BUFFER_BYTES // 3)
    assert caught.value.errno == errno.EFBIG
