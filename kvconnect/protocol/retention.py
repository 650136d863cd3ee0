"""How long a request wants its blocks kept: by ranges of its prompt, and for what it decodes."""

from __future__ import annotations

import bisect
import itertools

import msgspec

from kvconnect.errors import ConfigError

__all__ = ["DEFAULT_PRIORITY", "Retention", "TokenRange", "check_priority"]

DEFAULT_PRIORITY = 35
"""Of blocks of which nobody says anything; priorities are 0 (first to go) to 100."""


def check_priority(field: str, value: object) -> None:
    """Refuse what is no priority.

    Raises:
        ConfigError: Names `field`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 100:
        raise ConfigError(f"{field} must be an integer from 0 to 100, not {value!r}")


def _check_duration(field: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    if value is not None and not number:
        raise ConfigError(f"{field} must be a positive number of seconds, or None, not {value!r}")


class TokenRange(msgspec.Struct, frozen=True):
    """What a request wants of the prompt's tokens ``[start, end)``.

    Attributes:
        start: First token.
        end: Token after the last, None for all that follow.
        priority: Of their blocks.
        duration_s: Seconds after which that becomes `DEFAULT_PRIORITY`, None for never.
    """

    start: int
    end: int | None
    priority: int
    duration_s: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: Names the field that is wrong.
        """
        if not isinstance(self.start, int) or self.start < 0:
            raise ConfigError(f"start must be a token's position, not {self.start!r}")
        if self.end is not None and (not isinstance(self.end, int) or self.end <= self.start):
            raise ConfigError(f"end must be None or greater than start, {self.start}, not {self.end!r}")
        check_priority("priority", self.priority)
        _check_duration("duration_s", self.duration_s)


class Retention(msgspec.Struct, frozen=True):
    """What a request wants of its blocks. A block counts as its first token does.

    Attributes:
        ranges: Of the prompt, none over another; kept in order.
        decode_priority: Of blocks that begin in decoded tokens.
        decode_duration_s: Seconds after which that becomes `DEFAULT_PRIORITY`, None for never.
    """

    ranges: tuple[TokenRange, ...] = ()
    decode_priority: int = DEFAULT_PRIORITY
    decode_duration_s: float | None = None

    def __post_init__(self) -> None:
        """Check the values and order the ranges.

        Raises:
            ConfigError: Names the field that is wrong.
        """
        ranges = tuple(sorted(self.ranges, key=lambda each: each.start))
        for one, other in itertools.pairwise(ranges):
            if one.end is None or one.end > other.start:
                raise ConfigError(f"ranges must not overlap: {one} and {other}")
        msgspec.structs.force_setattr(self, "ranges", ranges)
        check_priority("decode_priority", self.decode_priority)
        _check_duration("decode_duration_s", self.decode_duration_s)

    def of_block(self, ordinal: int, block_size: int, num_prompt_tokens: int) -> tuple[int, float | None]:
        """Return the priority of a new block, and the seconds for which it has it, None for ever.

        Args:
            ordinal: Which block of the sequence.
            block_size: Tokens a block.
            num_prompt_tokens: Tokens from there on are decoded ones.
        """
        return self.said_of_block(ordinal, block_size, num_prompt_tokens) or (DEFAULT_PRIORITY, None)

    def said_of_block(self, ordinal: int, block_size: int, num_prompt_tokens: int) -> tuple[int, float | None] | None:
        """Return the same, None if nothing is said of the block: then one that has another priority keeps it."""
        token = ordinal * block_size
        if token >= num_prompt_tokens:
            return self.decode_priority, self.decode_duration_s
        after = bisect.bisect_right(self.ranges, token, key=lambda each: each.start)
        if after == 0:
            return None
        found = self.ranges[after - 1]
        return (found.priority, found.duration_s) if found.end is None or token < found.end else None
