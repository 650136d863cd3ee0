"""Bytes under keys: what a store author writes, the frame that rests in a store, and the threads that call one."""

from kvconnect.store.base import BlockStore, StoreCapabilities, StoreContext
from kvconnect.store.frame import HEADER_BYTES, FrameHeader, compress_frame, decompress_payload, open_frame, seal_frame
from kvconnect.store.tag import FrameTagger
from kvconnect.store.threads import CallEvent, Outcome, StoreThreads
from kvconnect.store.tier import Tier, TierOptions
from kvconnect.store.wrapper import WrapperStore

__all__ = [
    "HEADER_BYTES",
    "BlockStore",
    "CallEvent",
    "FrameHeader",
    "FrameTagger",
    "Outcome",
    "StoreCapabilities",
    "StoreContext",
    "StoreThreads",
    "Tier",
    "TierOptions",
    "WrapperStore",
    "compress_frame",
    "decompress_payload",
    "open_frame",
    "seal_frame",
]
