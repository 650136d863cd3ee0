"""One request as the engine sees it, and what comes out of it."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from kvconnect.engine.stats import BlockCounts
from kvconnect.errors import ConfigError
from kvconnect.protocol import BlockChain, CacheUse, RequestView, Retention

__all__ = ["EngineRequest", "FinishReason", "RequestOutput", "SamplingParams", "TokenOutput"]

FinishReason = Literal["length", "stop", "aborted"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to decode.

    Attributes:
        max_tokens: Tokens to generate at most; positive.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        top_p: Sample from the smallest set of best tokens whose probabilities reach it.
        seed: Makes sampling repeatable, whatever else is in the batch; None for a fresh one each time.
        stop_token_ids: Tokens that end the output; the one that did is its last.
        stop: Texts that end the output; it is cut before them. Needs a tokenizer.
        ignore_eos: Go on after the end-of-sequence token.
        cache: What the request may do with the connector.
        cache_salt: Keeps this caller's blocks apart from others'.
        retention: How long its blocks are worth keeping, on the device and below; None for the default.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    cache: CacheUse = "both"
    cache_salt: str | None = None
    retention: Retention | None = None

    def __post_init__(self) -> None:
        """Refuse what could not run.

        Raises:
            ConfigError: Names the field.
        """
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.cache not in ("both", "read", "write", "none"):
            raise ConfigError(f"cache must be 'both', 'read', 'write' or 'none', not {self.cache!r}")
        if not all(self.stop):
            raise ConfigError("a stop text must not be empty")


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request.

    Attributes:
        request_id: Its id.
        prompt_tokens: Tokens of the prompt: computed, reused and loaded ones add up to it.
        computed_tokens: Prompt tokens that the model ran over.
        reused_tokens: Prompt tokens whose KV was on the device.
        loaded_tokens: Prompt tokens whose KV came through the connector.
        token_ids: What was generated.
        text: The same, decoded, cut before a stop text; ``""`` without a tokenizer.
        finish_reason: ``"length"``, ``"stop"``, or ``"aborted"``.
        ttft_s: Seconds from arrival to the first token.
        blocks: What became of its blocks, in all its runs if it was preempted.
    """

    request_id: str
    prompt_tokens: int
    computed_tokens: int
    reused_tokens: int
    loaded_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    ttft_s: float
    blocks: BlockCounts


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One generated token, as it comes.

    Attributes:
        request_id: Whose it is.
        token_id: The token.
        finished: The whole result if this was the last token, else None.
    """

    request_id: str
    token_id: int
    finished: RequestOutput | None = None


class EngineRequest:
    """A request from arrival to its last token.

    Attributes:
        tokens: The prompt and what was generated and taken.
        tables: One block table a layer group; -1 where a block has no page.
        run: Counts the times that it began: results of a run before this one mean nothing.
        num_computed: Tokens that are scheduled or computed; the next step goes on there.
        num_pending: Tokens that scheduled steps will have sampled, not taken yet.
        num_named: Full blocks that other requests may find.
        num_told: Tokens that the leader was told of.
        num_reused: Of those computed when it was scheduled first, how many were on the device.
        num_loaded: And how many came through the connector.
        bad_blocks: Blocks of its asynchronous load that did not arrive.
        ranks_loaded: Ranks that have said that its asynchronous load ended.
        aborted: Whether it was aborted while it was parked.
        give_up_at: Monotonic time after which its asynchronous load is not waited for, 0 while there is none.
        failed_loads: Loads that failed; after `MAX_FAILED_LOADS` the leader is not asked again.
        seed: Of its sampling.
        scheduled_before: Whether a step named it since it arrived or was reset.
        resumes: Whether its asynchronous load brings back what it had computed when it was suspended.
        counts: What became of its blocks.
        dummy: It is computed and not cached, and no connector hears of it: for warming up.
    """

    MAX_FAILED_LOADS = 3

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        block_size: int,
        num_groups: int,
        dummy: bool = False,
    ) -> None:
        """Take a prompt of at least one token."""
        self.request_id = request_id
        self.params = params
        self.num_prompt_tokens = len(prompt)
        self.tokens = array("I", prompt)  # packed once, on arrival: hashing takes it as it is
        self.chain = BlockChain(block_size, salt=params.cache_salt)
        self.chain.extend(self.tokens)
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.run = 0
        self.num_computed = 0
        self.num_pending = 0
        self.num_named = 0
        self.num_told = len(self.tokens)
        self.num_reused = 0
        self.num_loaded = 0
        self.bad_blocks: set[int] = set()
        self.ranks_loaded: set[int] = set()
        self.aborted = False
        self.give_up_at = 0.0
        self.failed_loads = 0
        self.scheduled_before = False
        self.resumes = False
        self.counts = BlockCounts()
        self.dummy = dummy
        self.arrived_at = time.perf_counter()
        self.first_token_at = 0.0
        self.first_counts = (0, 0)
        self.seed = secrets.randbits(64) if params.seed is None else params.seed

    def view(self) -> RequestView:
        """Return what a connector may know of it."""
        return RequestView(
            request_id=self.request_id,
            tokens=self.tokens,
            num_prompt_tokens=self.num_prompt_tokens,
            cache_salt=self.params.cache_salt,
            cache=self.params.cache,
            retention=self.params.retention,
        )

    def append(self, token: int) -> None:
        """Add a generated token that a step has sampled."""
        self.num_pending -= 1
        if not self.first_token_at:
            self.first_token_at = time.perf_counter()
            self.first_counts = (self.num_reused, self.num_loaded)
        self.tokens.append(token)
        self.chain.extend((token,))

    def reset(self) -> None:
        """Go back to having computed nothing; what was generated stays, what is in flight does not count."""
        self.run += 1
        self.num_computed = self.num_pending = self.num_named = 0
        self.num_reused = self.num_loaded = 0
        self.num_told = len(self.tokens)
        self.bad_blocks = set()
        self.ranks_loaded = set()
        self.scheduled_before = False
        self.resumes = False

    @property
    def num_generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def generated(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.num_prompt_tokens :].tolist()

    def output(self, text: str, finish_reason: FinishReason) -> RequestOutput:
        """Return the result."""
        reused, loaded = self.first_counts
        return RequestOutput(
            request_id=self.request_id,
            prompt_tokens=self.num_prompt_tokens,
            computed_tokens=self.num_prompt_tokens - reused - loaded,
            reused_tokens=reused,
            loaded_tokens=loaded,
            token_ids=self.generated,
            text=text,
            finish_reason=finish_reason,
            ttft_s=(self.first_token_at or time.perf_counter()) - self.arrived_at,
            blocks=msgspec.structs.replace(self.counts),
        )
