"""A store and a leader that do as a test says; named to kvconnect by ``KVCONNECT_PLUGINS=tests.vllm.faulty``."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from kvconnect import BlockStore, Capabilities, Connector, Options, StoreCapabilities, StoreContext, hookimpl
from kvconnect.leader import OffloadLeader
from kvconnect.protocol import BlockKey, LeaderContext, WorkerContext

__all__ = ["Faults", "FaultyConnector", "FaultyStore"]


class Faults:
    """What goes wrong, for every store and worker of the process; `clear` before each test.

    Attributes:
        store: Names of store methods that raise.
        hang: Set to let store calls wait until it is cleared.
        lose: Loads of the arena that fail: how many more blocks.
        corrupt: Whether loads bring garbage, and say nothing.
        silent: Whether workers keep quiet about asynchronous loads that ended.
        frames: What the stores hold.
    """

    store: ClassVar[set[str]] = set()
    gate: ClassVar[threading.Event] = threading.Event()
    lose: ClassVar[int] = 0
    corrupt: ClassVar[bool] = False
    silent: ClassVar[bool] = False
    frames: ClassVar[dict[BlockKey, bytes]] = {}

    @classmethod
    def clear(cls) -> None:
        """Let nothing go wrong, and the stores be empty."""
        cls.store, cls.lose, cls.corrupt, cls.silent, cls.frames = set(), 0, False, False, {}
        cls.gate.set()


class FaultyStore(BlockStore):
    """Frames in a dictionary that every instance shares."""

    Options = Options
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(shared=True)

    def __init__(self, options: Any, context: StoreContext) -> None:
        pass

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        self._maybe_fail("contains")
        return [key in Faults.frames for key in keys]

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        self._maybe_fail("read")
        lengths: list[int | None] = []
        for key, buffer in zip(keys, buffers, strict=True):
            frame = Faults.frames.get(key)
            if frame is not None:
                buffer[: len(frame)] = frame
            lengths.append(None if frame is None else len(frame))
        return lengths

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        self._maybe_fail("write")
        Faults.frames.update((key, bytes(frame)) for key, frame in zip(keys, frames, strict=True))
        return [True] * len(keys)

    def remove(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            Faults.frames.pop(key, None)

    def close(self) -> None:
        pass

    def _maybe_fail(self, name: str) -> None:
        Faults.gate.wait(30)
        if name in Faults.store:
            raise ConnectionError("the store is gone")


class FaultyOptions(Options, frozen=True):
    """`parks` lets it offer asynchronous loads only."""

    capacity: int = 1 << 20
    parks: bool = False


class FaultyConnector(Connector):
    """The offload connector, with workers that lose blocks of the arena and keep quiet when told to."""

    Options = FaultyOptions
    capabilities = Capabilities(
        async_load=True, several_groups=True, several_ranks=True, needs=("handshake", "reports")
    )

    def make_leader(self, options: FaultyOptions, context: LeaderContext) -> OffloadLeader:
        engine = msgspec.structs.replace(context.engine, sync_load=not options.parks)
        return OffloadLeader(msgspec.structs.replace(context, engine=engine))

    def make_worker(self, options: FaultyOptions, context: WorkerContext) -> Any:
        from kvconnect.protocol import Finished
        from kvconnect.worker import OffloadWorker

        class FaultyWorker(OffloadWorker):
            def __init__(self, context: WorkerContext, *, capacity: int) -> None:
                super().__init__(context, capacity=capacity)
                self._kept_back: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())

            def start_load_kv(self) -> None:
                for move in self._now.loads[-Faults.lose :] if Faults.lose else ():
                    self._held.pop(move.slot, None)
                    for region in self._layout.groups[move.group].regions:  # type: ignore[union-attr]
                        region.tensor[move.target] = 0.5  # plausible: nothing but the report tells
                    Faults.lose -= 1
                loads = list(self._now.loads) if Faults.corrupt else []
                super().start_load_kv()
                for move in loads:
                    for region in self._layout.groups[move.group].regions:  # type: ignore[union-attr]
                        region.tensor[move.target] = 0.5

            def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
                saved, loaded, failed = super().get_finished(finished_req_ids)
                loaded, failed = loaded | self._kept_back[0], failed | self._kept_back[1]
                self._kept_back = (frozenset(), frozenset())
                if Faults.silent:
                    self._kept_back, loaded, failed = (loaded, failed), frozenset(), frozenset()
                return Finished(saved, loaded, failed)

        return FaultyWorker(context, capacity=options.capacity)


@hookimpl
def kvconnect_register(registry: Any) -> None:
    registry.add("faulty", "tests.vllm.faulty:FaultyStore")
    registry.add("losing", "tests.vllm.faulty:FaultyConnector")
