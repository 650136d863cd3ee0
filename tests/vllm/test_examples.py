"""The vLLM examples run as a newcomer would run them: what a second process loads is what the first one computed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_persistent_cache"
BLOCK_SIZE = 128  # vLLM's own choice on CPUs; on GPUs it is smaller
TIMEOUT_S = 540.0
# as a user has it: the engine core in a process of its own
ENVIRONMENT = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def _session(leader: int) -> list[int]:
    """Return the living processes of a session."""
    pids = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                pids.append(int(status.parent.name))
    return pids


def _stop(leader: int) -> None:
    for _ in range(100):
        for pid in _session(leader):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not _session(leader):
            return
        time.sleep(0.1)


def _shared_files() -> set[str]:
    return {str(path) for path in Path("/dev/shm").glob("vllm_*")}


def _mapped_files() -> str:
    maps = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            maps.append(path.read_text())
    return "".join(maps)


@contextlib.contextmanager
def _nothing_left(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop what the process has started, and remove the shared memory that none of it gave back."""
    before = _shared_files()
    try:
        yield
    finally:
        _stop(process.pid)
        process.wait()
        mapped = _mapped_files()
        for name in _shared_files() - before:
            if name not in mapped:  # else it belongs to somebody who was started meanwhile
                Path(name).unlink(missing_ok=True)


def _run(script: str, log: Path, *arguments: str) -> str:
    """Run one of the example's scripts in a session of its own and return what it printed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLE / script), *arguments],
            cwd=log.parent,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _nothing_left(process):
            code = process.wait(TIMEOUT_S)
    printed = log.read_text(errors="replace")
    assert code == 0, printed[-8000:]
    return printed


def _check(printed: str) -> None:
    """Check that the second process loaded every block that lies before the prompt's last token."""
    counts = [tuple(map(int, found)) for found in re.findall(r": (\d+) prompt tokens, (\d+) loaded", printed)]
    assert len(counts) == 2, printed[-8000:]
    (tokens, loaded_first), (again, loaded) = counts
    assert tokens == again > 4 * BLOCK_SIZE
    assert loaded_first == 0
    assert tokens - 2 * BLOCK_SIZE <= loaded < tokens
    assert "answers: equal" in printed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    _run("small_model.py", folder / "log", str(folder / "model"), "--layers", "2", "--hidden-size", "256")
    return str(folder / "model")


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def test_a_second_offline_process_loads_what_the_first_computed(model: str, tmp_path: Path) -> None:
    _check(_run("offline.py", tmp_path / "log", str(tmp_path / "cache"), "--model", model, "--rules", "40"))


def test_a_restarted_server_loads_what_the_first_computed(model: str, tmp_path: Path, port: int) -> None:
    arguments = [
        str(tmp_path / "cache"),
        "--model",
        model,
        "--rules",
        "40",
        "--port",
        str(port),
        "--max-model-len",
        "2048",
    ]
    _check(_run("serve_twice.py", tmp_path / "log", *arguments))
