"""What an engine must offer to be looked at by `EngineTests`: a few methods, an adapter of some forty lines.

class MyEngine(EngineUnderTest):
    block_size = 16
    ...

class TestMyEngine(EngineTests):
    @pytest.fixture
    def engine(self):
        return MyEngine
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

__all__ = ["EngineSetting", "EngineUnderTest"]


class EngineSetting(msgspec.Struct, frozen=True, kw_only=True):
    """What a test wants of an engine.

    Attributes:
        num_blocks: Blocks that the cache holds in each layer group.
        batch_blocks: Tokens that one step computes at most, in blocks.
        num_ranks: Workers.
        shape: Full attention, a sliding window in every layer, or both kinds.
        async_scheduling: Steps are planned before the results of the one before are taken.
        async_load: Requests may be parked.
    """

    num_blocks: int = 64
    batch_blocks: int = 32
    num_ranks: int = 1
    shape: Literal["full", "window", "mixed"] = "full"
    async_scheduling: bool = False
    async_load: bool = False


class EngineUnderTest(ABC):
    """One engine with a connector under it, in this process; its own prefix cache may be on.

    Attributes:
        block_size: Tokens a block.
        vocabulary: Prompts have tokens in ``[1, vocabulary)``.
        window: Tokens of the sliding window where `EngineSetting.shape` asks for one.
    """

    block_size: ClassVar[int]
    vocabulary: ClassVar[int] = 100
    window: ClassVar[int] = 0

    @abstractmethod
    def __init__(self, connector: Any, setting: EngineSetting, folder: Path) -> None:
        """Start the engine.

        Args:
            connector: What ``connector=`` takes; None for no connector.
            setting: What it must be able to do.
            folder: A place for files.

        Raises:
            UnsupportedError: If this engine has no such setting; the test counts as not declared.
        """

    @abstractmethod
    def add(self, prompt: Sequence[int], max_tokens: int) -> str:
        """Queue a prompt for greedy decoding of exactly `max_tokens`; return a name for it."""

    @abstractmethod
    def abort(self, name: str) -> None:
        """End a request at once, wherever it is."""

    @abstractmethod
    def step(self) -> None:
        """Run one engine step, an empty one if there is nothing to compute."""

    @abstractmethod
    def output(self, name: str) -> list[int] | None:
        """Return the tokens of a request that has finished; None before."""

    @abstractmethod
    def is_idle(self) -> bool:
        """Whether the engine would stop stepping: no request, and no work of the connector's."""

    @abstractmethod
    def forget(self) -> None:
        """Forget the prefix cache on the device, so that the next prompt depends on the connector."""

    @abstractmethod
    def expected(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return what must come out, by other means than this engine with a connector."""

    @abstractmethod
    def close(self) -> None:
        """Shut it down, and the connector with it."""
