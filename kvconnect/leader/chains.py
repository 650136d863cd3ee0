"""The block hashes of every living request: what a leader of your own asks about, loads and saves by.

The offload leader keeps more about a request (`leader/request.py`); this is all that a small one needs.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from kvconnect.errors import UnsupportedError
from kvconnect.protocol import BlockChain, BlockHash, RequestView, ScheduledRequest

__all__ = ["RequestChains", "new_chain"]


def new_chain(request: RequestView, block_size: int, *, secret: bytes = b"", epoch: bytes = b"") -> BlockChain:
    """Return an empty chain whose root holds whatever tells the request's blocks from others of the same tokens."""
    return BlockChain(
        block_size,
        salt=request.cache_salt,
        adapter=request.adapter,
        media=request.media,
        secret=secret,
        epoch=epoch,
    )


class RequestChains:
    """Hashes prompts when they arrive and tokens as they become known; knows who may load and who may save.

    Attributes:
        block_size: Tokens a block, from the handshake; 0 before it, and then nothing is cached.
    """

    def __init__(self, block_size: int = 0) -> None:
        """Know no request."""
        self.block_size = block_size
        self._epoch = b""
        self._chains: dict[str, tuple[str, BlockChain]] = {}

    def add(self, request: RequestView) -> None:
        """Hash a new request's prompt, unless nothing of it may be cached. For `on_new_request`."""
        self.drop(request.request_id)
        if not self.block_size or request.uncacheable or request.cache == "none":
            return
        chain = new_chain(request, self.block_size, epoch=self._epoch)
        self._chains[request.request_id] = (request.cache, chain)
        self._extend(request.request_id, request.tokens)

    def beyond(self, request: RequestView, num_computed_tokens: int) -> Sequence[BlockHash]:
        """Return the hashes of the blocks that could be loaded. For `get_num_new_matched_tokens`.

        They begin at `num_computed_tokens` and leave a token to compute; none if that is no multiple of the block size,
        or if the request may not load.
        """
        cache, chain = self._chains.get(request.request_id, ("none", None))
        if chain is None or cache == "write" or num_computed_tokens % self.block_size:
            return ()
        if chain.num_tokens < len(request.tokens) and not self._extend(
            request.request_id, request.tokens[chain.num_tokens :]
        ):
            return ()
        return chain.hashes[num_computed_tokens // self.block_size : (len(request.tokens) - 1) // self.block_size]

    def filled(self, part: ScheduledRequest) -> list[tuple[BlockHash, int]]:
        """Return (hash, ordinal) of the blocks that a step fills, all tokens known. For `build_connector_meta`."""
        cache, chain = self._chains.get(part.request_id, ("none", None))
        missing = 0 if chain is None else part.num_tokens - chain.num_tokens
        if chain is None or missing > len(part.new_tokens):  # tokens that were never told: what follows is not certain
            self.drop(part.request_id)
            return []
        if missing > 0 and not self._extend(part.request_id, part.new_tokens[-missing:]):
            return []
        start = part.num_computed_tokens // self.block_size
        end = min((part.num_computed_tokens + part.num_scheduled_tokens) // self.block_size, len(chain.hashes))
        return [(chain.hashes[i], i) for i in range(start, end)] if cache != "read" else []

    def drop(self, request_id: str) -> None:
        """Forget a request; absent is fine. For `request_finished`."""
        self._chains.pop(request_id, None)

    def reset(self) -> None:
        """Begin a new epoch: no hash from before comes again. For `reset_cache`."""
        self._epoch = secrets.token_bytes(16)
        self._chains.clear()

    def _extend(self, request_id: str, tokens: Sequence[int]) -> bool:
        try:
            self._chains[request_id][1].extend(tokens)
        except UnsupportedError:  # an id that is no token: unknown means "do not cache"
            self.drop(request_id)
            return False
        return True
