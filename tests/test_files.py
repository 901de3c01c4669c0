"""Locks of files: whoever holds one is alone, and a killed process holds none."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from maepretrain.files import locked

HOLD = """
import sys, time
from pathlib import Path
from maepretrain.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_threads_take_turns_and_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")

    def add_one(_: int) -> None:
        with locked(path):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(100)))
    assert path.read_text() == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_a_killed_process_frees_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "a"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(f"{path}.lock").acquire(timeout=0.2)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(path):
        assert Path(f"{path}.lock").exists()
    holder.stdout.close()


FORK = """
import os, signal, sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
child = os.fork()
if not child:
    time.sleep(60)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As a loader process, which may live longer than the run that was killed."""
    command = [sys.executable, "-c", FORK, str(tmp_path / "lock")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.wait()
    try:
        filelock.FileLock(tmp_path / "lock").acquire(timeout=1)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_a_disk_without_locks_excludes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: filelock.FileLock, *_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with locked(tmp_path / "a"), locked(tmp_path / "a"):
        pass
