"""Tests under a real vLLM. They run in an environment of their own: `make test-vllm`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# before vLLM is imported anywhere: no network, one engine core in this process, a small pool, two cores
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    OMP_NUM_THREADS="2",
    VLLM_CACHE_ROOT=os.path.expanduser("~/.cache/vllm"),  # what it knows of models, whatever the cache of digests is
)

HAS_VLLM = importlib.util.find_spec("vllm") is not None or "KVCONNECT_NEEDS_VLLM" in os.environ
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """VLLM and what it imports warn of much that is theirs; what is ours stays an error."""
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("filterwarnings", "error:::kvconnect")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama, with a tokenizer."""
    from tests.vllm.models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def _own_digest_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
