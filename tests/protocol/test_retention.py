"""What a request may want of its blocks, and which block gets what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.errors import ConfigError
from kvconnect.protocol import DEFAULT_PRIORITY, Retention, TokenRange


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"start": -1}, "start"),
        ({"start": 1.5}, "start"),
        ({"start": 8, "end": 8}, "end"),
        ({"start": 8, "end": 7}, "end"),
        ({"end": "9"}, "end"),
        ({"priority": -1}, "priority"),
        ({"priority": 101}, "priority"),
        ({"priority": True}, "priority"),
        ({"duration_s": 0}, "duration_s"),
        ({"duration_s": -1.0}, "duration_s"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"duration_s": "1"}, "duration_s"),
    ],
)
def test_bad_range_is_refused_by_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} must"):
        TokenRange(**{"start": 0, "end": None, "priority": 50, **fields})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"decode_priority": 101}, "decode_priority"),
        ({"decode_duration_s": 0}, "decode_duration_s"),
        ({"ranges": (TokenRange(0, 9, 1), TokenRange(8, 10, 1))}, "ranges"),
        ({"ranges": (TokenRange(8, 10, 1), TokenRange(0, None, 1))}, "ranges"),
    ],
)
def test_bad_retention_is_refused_by_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} must"):
        Retention(**fields)


def test_block_counts_as_its_first_token_does() -> None:
    retention = Retention((TokenRange(9, None, 80, 5.0), TokenRange(2, 5, 10)), decode_priority=50)
    found = [retention.of_block(ordinal, 4, 18) for ordinal in range(6)]
    # tokens 0, 4, 8, 12, 16 and 20; the prompt ends at 18
    default = (DEFAULT_PRIORITY, None)
    assert found == [default, (10, None), default, (80, 5.0), (80, 5.0), (50, None)]
    said = [retention.said_of_block(ordinal, 4, 18) for ordinal in range(6)]
    assert said == [None, (10, None), None, (80, 5.0), (80, 5.0), (50, None)]


@given(
    bounds=st.lists(st.integers(0, 60), min_size=2, max_size=8, unique=True).map(sorted),
    size=st.integers(1, 9),
    prompt=st.integers(0, 70),
    order=st.randoms(use_true_random=False),
)
def test_every_block_gets_what_a_search_finds(bounds: list[int], size: int, prompt: int, order: Any) -> None:
    ranges = [TokenRange(bounds[i], bounds[i + 1], i) for i in range(0, len(bounds) - 1, 2)]
    order.shuffle(ranges)
    retention = Retention(tuple(ranges), decode_priority=99, decode_duration_s=2.0)
    for ordinal in range(12):
        token = ordinal * size
        expected: tuple[int, float | None] = (35, None)
        for each in ranges:
            if each.end is not None and each.start <= token < each.end:
                expected = (each.priority, None)
        assert retention.of_block(ordinal, size, prompt) == (expected if token < prompt else (99, 2.0))
