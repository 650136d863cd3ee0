"""One pool for all tests that do no harm to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.remote.mooncake.pool import Pool, needs_mooncake


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A master, and 512 MiB in a process of its own."""
    needs_mooncake()
    with Pool(tmp_path_factory.mktemp("mooncake")) as started:
        yield started
