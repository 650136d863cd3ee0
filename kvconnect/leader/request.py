"""What the offload leader knows of one request: its chain, what it waits for, what it holds."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence

from kvconnect.errors import UnsupportedError
from kvconnect.leader.index import BlockIndex, Entry, NewBlock
from kvconnect.protocol import DEFAULT_PRIORITY, BlockChain, BlockHash, RequestView

__all__ = ["PlannedLoad", "PlannedSave", "RequestState"]

logger = logging.getLogger(__name__)

_MAX_VOIDED = 8  # a worker whose every step fails must not make each plan longer than the one before

PlannedSave = tuple[Entry, int]
"""A reserved entry and which block of the request's sequence fills it."""


class PlannedLoad:
    """A block to load in the next plan; its entry is claimed until that step is reported, None if it went missing."""

    __slots__ = ("block_hash", "block_id", "entry", "group", "ordinal")

    def __init__(self, entry: Entry | None, block_hash: BlockHash, group: int, ordinal: int, block_id: int) -> None:
        """Bind a block to the page that it goes to."""
        self.entry = entry
        self.block_hash = block_hash
        self.group = group
        self.ordinal = ordinal
        self.block_id = block_id


class RequestState:
    """One request from `on_new_request` to `request_finished`.

    Attributes:
        request_id: Its id.
        chain: Hashes of its blocks; None if it must not be cached.
        tokens: Those that the chain was given, if events tell of them; else empty.
        reads: Whether it may load.
        writes: Whether it may save.
        retention: What it wants of its blocks, None if it says nothing.
        num_prompt_tokens: How many of its tokens are the prompt.
        first: Block from which the last offer counted.
        next_save: First block that was not yet considered for saving; None before it was scheduled.
        num_voided: Steps whose saves were void and considered once more.
        planned_tokens: Tokens that are computed once every step planned so far has run.
        last_step: The last step that had a part for it, -1 for none.
        loads: Loads for the next plan.
        parked: Whether the request was offered an asynchronous load, and waits for it once it has pages.
        loads_below: Whether what lies in stores is loaded, False if computing is faster, None if not decided.
        looked_up: Whether the stores were asked about its blocks.
        tried: Promotions asked for already, (tier, group, block): each is tried once.
        wanted: Blocks to promote in the next plan, (tier, group, block ordinal).
        promoting: Blocks on their way up for this request.
        held: Blocks promoted for this request and claimed until it is allocated.
        claimed: Blocks that the engine counts on, claimed until it allocates or gives them up.
        suspended: While it is suspended, the hash of each block by (group, ordinal): private ones are in no chain.
        below: Blocks, (group, hash), that a store holds for it since it was suspended, and which tier.
        give_up_at: Monotonic time after which it waits no longer for promotions, 0 while it has not begun.
        void_until: Saves of steps up to this one are void: they may have been computed on garbage.
    """

    __slots__ = (
        "_keeps_tokens",
        "below",
        "chain",
        "claimed",
        "first",
        "give_up_at",
        "held",
        "last_step",
        "loads",
        "loads_below",
        "looked_up",
        "next_save",
        "num_prompt_tokens",
        "num_voided",
        "parked",
        "planned_tokens",
        "promoting",
        "reads",
        "request_id",
        "retention",
        "suspended",
        "tokens",
        "tried",
        "void_until",
        "wanted",
        "writes",
    )

    def __init__(self, request: RequestView, chain: BlockChain | None, *, keep_tokens: bool = False) -> None:
        """Start with nothing asked and nothing held.

        Args:
            request: The request, whose tokens the chain has.
            chain: Its hashes, None if it must not be cached.
            keep_tokens: Whether to keep its tokens, for events.
        """
        self.request_id = request.request_id
        self.chain = chain
        self._keeps_tokens = keep_tokens and chain is not None
        self.tokens = array("I", request.tokens if self._keeps_tokens else ())
        self.reads = chain is not None and request.cache in ("both", "read")
        self.writes = chain is not None and request.cache in ("both", "write")
        self.retention = request.retention
        self.num_prompt_tokens = request.num_prompt_tokens
        self.first = 0
        self.next_save: int | None = None
        self.num_voided = 0
        self.planned_tokens = 0
        self.last_step = -1
        self.loads: list[PlannedLoad] = []
        self.parked = False
        self.loads_below: bool | None = None
        self.looked_up = False
        self.tried: set[tuple[int, int, int]] = set()
        self.wanted: list[tuple[int, int, int]] = []
        self.promoting: set[Entry] = set()
        self.held: list[Entry] = []
        self.claimed: list[Entry] = []
        self.suspended: dict[tuple[int, int], BlockHash] = {}
        self.below: dict[tuple[int, BlockHash], int] = {}
        self.give_up_at = 0.0
        self.void_until = -1

    def extend(self, tokens: Sequence[int]) -> bool:
        """Hash more of the sequence's tokens; False, and no caching any more, if one of them is none."""
        if self.chain is None:
            return False
        try:
            self.chain.extend(tokens)
        except UnsupportedError as error:
            logger.debug("request %s is not cached any more: %s", self.request_id, error)
            self.stop_caching()
            return False
        if self._keeps_tokens:
            self.tokens.extend(tokens)
        return True

    @property
    def hashes(self) -> list[BlockHash]:
        """Of its full blocks, as far as its tokens are known; none if it must not be cached."""
        return [] if self.chain is None else self.chain.hashes

    def hash_of(self, group: int, ordinal: int) -> BlockHash:
        """Return the name of one of its blocks."""
        return self.suspended.get((group, ordinal)) or self.hashes[ordinal]

    def new_block(self, group: int, ordinal: int) -> NewBlock:
        """Describe one of its blocks that needs a slot."""
        before = self.hashes[ordinal - 1 : ordinal] if ordinal else []
        parent = self.suspended.get((group, ordinal - 1)) or (before[0] if before else None)
        return NewBlock(self.hash_of(group, ordinal), group, parent, self.priority_of(ordinal))

    def priority_of(self, ordinal: int) -> tuple[int, float | None]:
        """Return the priority of a new block, and the seconds for which it has it, None for ever."""
        if self.retention is None or self.chain is None:
            return DEFAULT_PRIORITY, None
        return self.retention.of_block(ordinal, self.chain.block_size, self.num_prompt_tokens)

    def retain(self, index: BlockIndex, entry: Entry, ordinal: int) -> None:
        """Give a block that the request uses, and another one brought, the priority that the request says, if any."""
        if self.retention is not None and self.chain is not None:
            said = self.retention.said_of_block(ordinal, self.chain.block_size, self.num_prompt_tokens)
            if said is not None:
                index.set_priority(entry, *said)

    def save_again(self, ordinal: int) -> None:
        """Consider blocks from `ordinal` on once more: what was saved of them is void. Not for ever."""
        if self.next_save is not None and self.num_voided < _MAX_VOIDED:
            self.num_voided += 1
            self.next_save = min(self.next_save, ordinal)

    def stop_caching(self) -> None:
        """Neither load nor save for this request any more: what is known of its tokens is not certain."""
        self.chain = None
        self.reads = self.writes = False

    def let_go(self, index: BlockIndex) -> None:
        """Release everything that waits for a plan or an allocation."""
        index.release_chain(self.held)
        self.held = []
        index.release_chain(self.claimed)
        self.claimed = []
        index.release_chain(load.entry for load in self.loads if load.entry is not None)
        self.loads = []
        self.wanted = []
        self.promoting.clear()
