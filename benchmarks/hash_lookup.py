"""Time to hash a prompt and look all its blocks up in the arena's index, against the bare hash chain.

    python benchmarks/hash_lookup.py

Both run interleaved in one process, over packed tokens as engines hold them (``array("I")``); figures are medians. The
bare chain is the shortest loop that gives the same hashes. "from list" is the same work for an engine that holds lists.
"""

import hashlib
import random
import statistics
import time
from array import array

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import (
    BlockChain,
    EngineCapabilities,
    Handshake,
    LeaderContext,
    Match,
    Namespace,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
)
from kvconnect.protocol.messages import GroupHandshake, Report

BLOCK = 16
LENGTHS = (8 << 10, 32 << 10, 128 << 10, 1 << 20)


def bare_chain(packed: bytes) -> bytes:
    parent = hashlib.blake2b(b"", digest_size=32, person=b"kvconnect-root-1").digest()
    prepared = hashlib.blake2b(digest_size=32, person=b"kvconnect-block1")
    for start in range(0, len(packed), 4 * BLOCK):
        hasher = prepared.copy()
        hasher.update(parent + packed[start : start + 4 * BLOCK])
        parent = hasher.digest()
    return parent


def leader_that_holds(tokens: list[int]) -> OffloadLeader:
    """Return a leader whose arena holds every block of `tokens`."""
    engine = EngineCapabilities(can_ask_again=True, load_errors="block", reports=True, handshake=True)
    leader = OffloadLeader(LeaderContext(namespace=Namespace(model="id:m", kv_dtype="float32"), engine=engine))
    groups = (GroupHandshake(BLOCK, 0, 2, 1024, 0),)
    leader.set_handshake_metadata([Handshake(rank=0, num_slots=len(tokens) // BLOCK + 1, groups=groups).encode()])
    view = RequestView(request_id="save", tokens=tokens, num_prompt_tokens=len(tokens))
    leader.on_new_request(view)
    scheduled = ScheduledRequest(
        request_id="save",
        num_computed_tokens=0,
        num_scheduled_tokens=len(tokens),
        num_tokens=len(tokens),
        new_tokens=(),
        block_ids=[list(range(len(tokens) // BLOCK))],
    )
    leader.build_connector_meta(SchedulerOutput(step=0, new_requests=(scheduled,)))
    leader.update_connector_output([Report(step=0, rank=0).encode()])
    leader.request_finished(view, [])
    return leader


def main() -> None:
    rng = random.Random(1)
    print(
        f"{'tokens':>9}  {'bare chain':>11}  {'hash + look up':>14}  {'ratio':>5}  {'from list':>9}  {'per block':>9}"
    )
    for length in LENGTHS:
        tokens = [rng.randrange(150_000) for _ in range(length)]
        packed_tokens = array("I", tokens)
        packed = packed_tokens.tobytes()
        leader = leader_that_holds(tokens)
        check = BlockChain(BLOCK)
        check.extend(tokens)
        assert bare_chain(packed) == check.hashes[-1]
        times: dict[str, list[float]] = {"bare": [], "list": [], "array": []}
        for number in range(21 if length < 1 << 20 else 7):
            started = time.perf_counter()
            bare_chain(packed)
            times["bare"].append(time.perf_counter() - started)
            for kind, given in (("list", tokens), ("array", packed_tokens)):
                name = f"{kind}-{number}"
                view = RequestView(request_id=name, tokens=given, num_prompt_tokens=length)
                started = time.perf_counter()
                leader.on_new_request(view)
                match = leader.get_num_new_matched_tokens(view, 0)
                times[kind].append(time.perf_counter() - started)
                assert match == Match((length - 1) // BLOCK * BLOCK, False)
                leader.request_finished(view, [])
        bare, ours, from_list = (statistics.median(times[kind]) for kind in ("bare", "array", "list"))
        print(
            f"{length:9,}  {bare * 1e3:8.2f} ms  {ours * 1e3:11.2f} ms  {ours / bare:5.2f}  {from_list / bare:9.2f}  "
            f"{ours / (length / BLOCK) * 1e9:6.0f} ns"
        )


if __name__ == "__main__":
    main()
