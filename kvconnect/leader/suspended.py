"""Where the blocks of suspended requests are, and what keeps them there. Plans; moves nothing.

A suspended block is claimed in the arena, or held in a store below it, so that nothing evicts its last copy:

    page ──save──► arena, claimed ──demote, hold──► arena and held in a store ──evict──► held in a store

Only stores that can hold take part; without one the blocks stay claimed in the arena. What a chain names keeps its
name, so that others may load it; a partial block, and any block of a request that is not shared, has a private one.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from kvconnect.leader.draft import PlanDraft
from kvconnect.leader.holds import StoreHolds
from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.leader.lookup import Presence
from kvconnect.leader.promotion import TierTraffic
from kvconnect.leader.request import PlannedLoad, RequestState
from kvconnect.protocol.keys import BlockHash, is_private, private_hash

__all__ = ["Suspensions"]

_MAX_REFUSALS = 2  # a store that does not keep a block for so many times keeps it never: it stays in the arena


class _Block:
    """One suspended block: `entry` is claimed while it is not None, `held_in` the tier that holds it, -1 for none."""

    __slots__ = (
        "asked_in",
        "block_hash",
        "entry",
        "goal",
        "group",
        "held_in",
        "ordinal",
        "page",
        "planned",
        "refusals",
    )

    def __init__(self, group: int, ordinal: int, page: int, block_hash: BlockHash) -> None:
        self.group = group
        self.ordinal = ordinal
        self.page = page  # its own until every rank has read it: while plans name the request
        self.block_hash = block_hash
        self.entry: Entry | None = None
        self.planned = False  # its save was planned, or needs none
        self.held_in = -1
        self.asked_in = -1  # the tier that was asked to hold it, and has not answered
        self.goal = -1  # the tier that a prefetch brings it to
        self.refusals = 0

    @property
    def name(self) -> tuple[int, BlockHash]:
        return self.group, self.block_hash


class _Suspension:
    def __init__(self, state: RequestState, blocks: list[_Block]) -> None:
        self.state = state
        self.blocks = blocks
        self.named = True  # plans name it until every rank has read its pages


class Suspensions:
    """The suspended requests of one leader."""

    def __init__(
        self,
        index: BlockIndex,
        traffic: TierTraffic,
        presence: Presence,
        block_size: int,
        make_holds: Callable[[Callable[[int, tuple[int, BlockHash], bool], None]], StoreHolds],
    ) -> None:
        """Know none.

        Args:
            index: The arena.
            traffic: Told what goes down and what comes up; tells when it has.
            presence: What the stores are believed to hold.
            block_size: Tokens a block.
            make_holds: Makes what holds blocks in stores; gets whom to tell of answers.
        """
        self._index = index
        self._traffic = traffic
        self._presence = presence
        self._block_size = block_size
        self._holds = make_holds(self._hold_answered)
        self._requests: dict[str, _Suspension] = {}
        self._blocks: dict[tuple[int, BlockHash], list[_Block]] = defaultdict(list)
        traffic.listener = self

    @property
    def busy(self) -> bool:
        """Whether steps are needed to get suspended blocks to where they are safe."""
        return self._holds.busy or any(each.named for each in self._requests.values())

    @property
    def named(self) -> tuple[str, ...]:
        """Requests that the next plan names: their pages are free once it is carried out."""
        return tuple(request_id for request_id, each in self._requests.items() if each.named)

    def __contains__(self, request_id: str) -> bool:
        """Say whether a request is suspended, or on its way back."""
        return request_id in self._requests

    def clean(self) -> None:
        """Remove, in the background, what suspended requests of processes that are gone left in stores."""
        self._holds.clean()

    def suspend(self, state: RequestState, block_ids: Sequence[Sequence[int]], num_tokens: int) -> bool:
        """Take slots for every page that is not below yet, all or none.

        Args:
            state: The request.
            block_ids: Its pages, by group; they stay its own until the ranks have reported a plan that names it.
            num_tokens: Tokens that are computed.
        """
        nonce = secrets.token_bytes(8)
        blocks = [
            self._block(state, nonce, group, ordinal, page, num_tokens)
            for group, table in enumerate(block_ids)
            for ordinal, page in enumerate(table[: -(-num_tokens // self._block_size)])
            if page >= 0
        ]
        state.suspended = {(block.group, block.ordinal): block.block_hash for block in blocks}
        missing = [block for block in blocks if not block.planned]
        if not self._take_slots(state, blocks, missing):
            state.suspended = {}
            return False
        for block in blocks:
            if state.below.get(block.name) == block.held_in >= 0:
                del state.below[block.name]  # its hold goes on under the block
            self._blocks[block.name].append(block)
        self._requests[state.request_id] = _Suspension(state, blocks)
        for block in blocks:
            if block.planned and block.entry is not None:
                self._secure(block)
        return True

    def _take_slots(self, state: RequestState, blocks: Sequence[_Block], missing: Sequence[_Block]) -> bool:
        """Claim what is in the arena, then take slots for the rest and claim them; False with nothing changed."""
        there = [block.entry for block in blocks if block.entry is not None]
        for entry in there:  # before room is made for the others
            self._index.claim(entry)
        entries: list[Entry] | None = None
        try:
            wanted = [state.new_block(block.group, block.ordinal) for block in missing]
            entries = self._index.reserve_all(wanted, State.RESERVED)
        finally:
            for entry in there if entries is None else ():
                self._index.release(entry)
        for block, entry in zip(missing, entries or (), strict=entries is not None):
            self._index.claim(entry)
            block.entry = entry
        return entries is not None

    def plan(self, draft: PlanDraft) -> None:
        """Save the pages of requests that were suspended since the last plan, or whose saves came to nothing."""
        for each in self._requests.values():
            if not each.named:
                continue
            planned = draft.begin_saves(each.state)
            for block in each.blocks:
                if block.planned:
                    continue
                entry = block.entry or self._reserve_again(each.state, block)
                if entry is None:
                    continue
                block.planned = True
                planned.append((entry, block.ordinal))
                draft.save(each.state, entry, block.page, block.ordinal)
        self._holds.submit()

    def _reserve_again(self, state: RequestState, block: _Block) -> Entry | None:
        """Take a slot for a block whose save came to nothing while its page is still there."""
        if self._index.get(*block.name) is not None:  # somebody else's, and on its way: the next plan looks again
            return None
        wanted = state.new_block(block.group, block.ordinal)
        block.entry = self._index.reserve(wanted.block_hash, wanted.group, State.RESERVED, wanted.parent, *wanted.rank)
        if block.entry is not None:
            self._index.claim(block.entry)
        return block.entry

    def reported(self, request_ids: Iterable[str]) -> None:
        """Learn that every rank got a plan that names these requests: their pages are the engine's again."""
        for request_id in request_ids:
            each = self._requests.get(request_id)
            if each is not None:
                each.named = False

    def closed(self, committed: Iterable[Entry], voided: Iterable[Entry]) -> None:
        """Learn what became of saves, after `TierTraffic.demote`."""
        for entry in committed:
            for block in self._blocks.get((entry.group, entry.block_hash), ()):
                if block.entry is entry:
                    self._secure(block)
        for entry in voided:
            for block in self._blocks.get((entry.group, entry.block_hash), ()):
                if block.entry is entry:
                    self._unclaim(block)
                    block.planned = False  # while plans name the request its page is still there

    def prefetch(self, request_id: str, tier: int) -> bool:
        """Take slots for every block that lies below `tier`, all or none; the next plan promotes them, in one batch.

        Args:
            request_id: A suspended request.
            tier: 0 for the arena, else ``1 +`` the number of a store that can hold.

        Returns:
            False if there is no room for all, or no such tier; then nothing has changed.
        """
        each = self._requests.get(request_id)
        if each is None or (tier and tier - 1 not in self._holds.tiers):
            return False
        mine = [self._index.get(*block.name) for block in each.blocks]
        ready = [entry for entry in mine if entry is not None and entry.state is State.READY]
        wanted = [
            block for block, entry in zip(each.blocks, mine, strict=True) if entry is None and block.held_in >= tier
        ]
        for entry in ready:  # making room must not push out what is up already
            self._index.claim(entry)
        try:
            moves = [(block.held_in, block.group, block.ordinal) for block in wanted]
            if not self._traffic.bring(moves, each.state):
                return False
            for block in wanted:
                block.goal = tier - 1
        finally:
            for entry in ready:
                self._index.release(entry)
        return True

    def resume(self, request_id: str) -> bool:
        """Prepare a request's blocks for a load; False if it is not suspended, or its pages are not read yet."""
        each = self._requests.get(request_id)
        if each is None or each.named:
            return False
        each.state.tried.clear()
        for block in each.blocks:
            if block.held_in >= 0:
                self._presence.add(block.held_in, block.group, block.block_hash)
        return True

    def loading(self, request_id: str, loads: Sequence[PlannedLoad]) -> None:
        """Learn that a plan loads blocks, and claims them for its step: their slots may make room for the rest."""
        each = self._requests.get(request_id)
        if each is None:
            return
        places = {(load.group, load.ordinal) for load in loads}
        for block in each.blocks:
            if (block.group, block.ordinal) in places:
                self._unclaim(block)

    def end(self, request_id: str) -> None:
        """Let a request's blocks go: it is resumed, or gone. What a store holds of its shared blocks stays held.

        The next suspension finds it there; `forget` ends it.
        """
        each = self._requests.pop(request_id, None)
        if each is None:
            return
        each.state.suspended.clear()
        for block in each.blocks:
            self._unlist(block)
            self._unclaim(block)
            if is_private(block.block_hash):
                self._remove(block)
            elif block.held_in >= 0:
                if block.name in each.state.below:
                    self._holds.let_go(block.held_in, block.name)
                else:
                    each.state.below[block.name] = block.held_in

    def forget(self, state: RequestState) -> None:
        """Hold nothing any more for a request that has ended."""
        self.end(state.request_id)
        for name, tier in state.below.items():
            self._holds.let_go(tier, name)
        state.below.clear()

    def lose_all(self) -> None:
        """Learn that nothing saved so far is good any more: suspended requests will be computed again."""
        for each in self._requests.values():
            for block in each.blocks:
                self._unlist(block)
                self._unclaim(block)
                if is_private(block.block_hash):
                    self._remove(block)
                elif block.held_in >= 0:
                    self._holds.let_go(block.held_in, block.name)
            each.blocks = []

    def get_stats(self) -> dict[str, dict[str, object]]:
        """Return for each suspended request its blocks, (layer group, ordinal, highest place), and how many move up.

        A place is 0 for the arena, ``1 +`` the number of a store, or -1: the block is lost, and will be computed again.
        """
        stats: dict[str, dict[str, object]] = {}
        for request_id, each in self._requests.items():
            entries = [self._index.get(*block.name) for block in each.blocks]
            up = [entry is not None and entry.state is not State.PROMOTING for entry in entries]
            stats[request_id] = {
                "blocks": [
                    (block.group, block.ordinal, 0 if there else block.held_in + (block.held_in >= 0))
                    for block, there in zip(each.blocks, up, strict=True)
                ],
                "moving": sum(entry is not None and entry.state is State.PROMOTING for entry in entries),
            }
        return stats

    # -- what the traffic tells ----------------------------------------------------------------------------------

    def promoted(self, entry: Entry) -> None:
        """A block came up."""
        for block in self._blocks.get((entry.group, entry.block_hash), ()):
            if block.goal >= 0:
                if block.goal < block.held_in:
                    self._traffic.down.offer([entry])
                block.goal = -1

    def demoted(self, tier: int, entry: Entry) -> None:
        """A store took a block."""
        for block in list(self._blocks.get((entry.group, entry.block_hash), ())):
            if tier in self._holds.tiers and block.asked_in < 0 and (block.held_in < 0 or tier < block.held_in):
                self._ask(block, tier)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _block(self, state: RequestState, nonce: bytes, group: int, ordinal: int, page: int, num_tokens: int) -> _Block:
        """Name a block, and find it in the arena or below if it is there already."""
        filled = min(self._block_size, num_tokens - ordinal * self._block_size)
        if state.writes and filled == self._block_size and ordinal < len(state.hashes):
            block = _Block(group, ordinal, page, state.hashes[ordinal])
            entry = self._index.get(*block.name)
            block.held_in = state.below.get(block.name, -1)
            if entry is not None and entry.state is State.READY and block.held_in < 0:
                block.entry = entry
            block.planned = block.entry is not None or block.held_in >= 0
            if entry is None or block.planned:
                return block
        # a block that is on its way up or down under its own name may still come to nothing
        return _Block(group, ordinal, page, private_hash(nonce, ordinal, filled))

    def _secure(self, block: _Block) -> None:
        """See to it that a store holds a block that lies in the arena."""
        for tier in self._holds.tiers:
            if self._presence.holds(tier, block.group, block.block_hash):
                self._ask(block, tier)
                return
        if block.entry is not None and block.entry.state is State.READY:
            self._traffic.down.offer([block.entry])

    def _ask(self, block: _Block, tier: int) -> None:
        if block.asked_in < 0:
            block.asked_in = tier
            self._holds.ask(tier, block.name)

    def _hold_answered(self, tier: int, name: tuple[int, BlockHash], held: bool) -> None:
        waiting = [block for block in self._blocks.get(name, ()) if block.asked_in == tier]
        if not waiting:  # it was resumed or ended meanwhile
            if held:
                self._holds.let_go(tier, name)
            return
        block = waiting[0]
        block.asked_in = -1
        if held:
            if block.held_in >= 0:
                self._holds.let_go(block.held_in, name)
            block.held_in = tier
            self._unclaim(block)
            return
        self._presence.discard(tier, *name)
        block.refusals += 1
        if block.refusals < _MAX_REFUSALS:
            self._secure(block)

    def _unclaim(self, block: _Block) -> None:
        if block.entry is not None:
            entry, block.entry = block.entry, None
            self._index.release(entry)

    def _unlist(self, block: _Block) -> None:
        mine = self._blocks[block.name]
        mine.remove(block)
        if not mine:
            del self._blocks[block.name]

    def _remove(self, block: _Block) -> None:
        """Forget a private block everywhere."""
        if block.held_in >= 0:
            self._holds.let_go(block.held_in, block.name)
        entry = self._index.get(*block.name)
        if entry is not None and entry.state is State.PROMOTING:
            entry.failed = True  # a store still reads into its slot: it goes when every rank has said how that ended
        elif entry is not None:
            self._index.void(entry)
        self._traffic.drop(*block.name)
