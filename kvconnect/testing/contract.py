"""What an engine owes to a connector, checked over the calls that a recording connector wrote down.

Each rule replays the whole list. They hold for any schedule, so every test of `EngineTests` ends with all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from kvconnect.testing.promise import must, must_equal
from kvconnect.testing.recording import Call, Planned, Script

__all__ = ["check_contract"]

_SAID = ("get_finished", "get_block_ids_with_load_errors")  # in any order


def check_contract(script: Script) -> None:
    """Look at everything that a connector was told, from the handshake to `shutdown`.

    Raises:
        BrokenPromise: At the first rule that the engine broke.
    """
    _start(script)
    _requests(script)
    _asks(script)
    _plans(script)
    _hooks_of_a_step(script)
    _reports(script)
    _schedule(script)
    _parked(script)
    _failed(script)
    _saved(script)
    _pages(script)
    _end(script)


def _start(script: Script) -> None:
    """Caches are registered once, then ranks shake hands, then requests come."""
    said = []
    for rank in sorted(script.layouts):
        mine = [call.hook for call in script.calls if call.rank == rank]
        must_equal(f"the first hooks of rank {rank}", mine[:2], ["register_kv_caches", "get_handshake_metadata"])
        must_equal(f"registrations of rank {rank}", mine.count("register_kv_caches"), 1)
        said.append(script.of("get_handshake_metadata", rank)[-1].data["answer"])
    shakes = script.of("set_handshake_metadata")
    must_equal("handshakes that the leader was given", [call.data["per_rank"] for call in shakes], [said])
    leader = [call.hook for call in script.calls if call.rank == -1]
    must_equal("the leader's first hook", leader[0], "set_handshake_metadata")


def _requests(script: Script) -> None:
    """Each request arrives once, ends once, and is named by nothing before or after."""
    alive: set[str] = set()
    ended: set[str] = set()
    for call in script.calls:
        names = [call.data["request"]] if "request" in call.data else []
        names += [part.request_id for part in call.data.get("parts", ())]
        if call.hook == "on_new_request":
            must(names[0] not in alive, expected="on_new_request once an id", got=f"{names[0]} twice")
            alive.add(names[0])
        for name in names:
            must(
                name in alive,
                expected=f"{call.hook} to name only requests that have arrived and not ended",
                got=f"{name}, which {'has ended' if name in ended else 'never arrived'}",
            )
        if call.hook == "request_finished":
            alive.discard(names[0])
            ended.add(names[0])
    must_equal("requests that arrived and never came to request_finished", sorted(alive), [])


def _asks(script: Script) -> None:
    """A request is asked about before its allocation, which takes what was offered or less, once."""
    size = script.layouts[0].groups[0].block_size
    groups = len(script.layouts[0].groups)
    answers: dict[str, tuple[int, Any]] = {}
    allocated: set[str] = set()
    for call in script.calls:
        name = call.data.get("request", "")
        if call.hook == "get_num_new_matched_tokens":
            must(
                name not in allocated,
                expected="no question about a request that has its pages",
                got=f"{name} was asked about after update_state_after_alloc",
            )
            answers[name] = (call.data["computed"], call.data["answer"])
        elif call.hook == "update_state_after_alloc":
            external, tables = call.data["external"], call.data["tables"]
            must(
                name not in allocated,
                expected="update_state_after_alloc once an allocation",
                got=f"a second one for {name}, without request_reset between",
                hint="a request that was parked has its pages already",
            )
            allocated.add(name)
            must_equal("block tables of an allocation, one a layer group", len(tables), groups)
            if external:
                computed, answer = answers.get(name, (0, (0, False)))
                offered = answer[0] if isinstance(answer, tuple) and isinstance(answer[0], int) else 0
                must(
                    0 < external <= offered and external % size == 0,
                    expected=f"at most the {offered} tokens that the last answer offered, in whole blocks",
                    got=f"num_external_tokens={external} for {name}",
                )
                reach = (computed + external) // size
                for group, table in enumerate(tables):
                    window = script.layouts[0].groups[group].window
                    needed = _first_needed(computed + external, size, window)
                    holes = [b for b in range(max(needed, computed // size), reach) if b >= len(table) or table[b] < 0]
                    must_equal(f"blocks of {name}'s load without a page in group {group}", holes, [])
        elif call.hook in ("request_reset", "request_finished"):
            allocated.discard(name)


def _plans(script: Script) -> None:
    """Steps are planned in order, and every worker gets every plan, once, as it was made."""
    plans = script.of("build_connector_meta")
    steps = [call.data["step"] for call in plans]
    must(steps == sorted(set(steps)), expected="step numbers that grow and never repeat", got=steps)
    made = [call.data["meta"] for call in plans]
    for rank in sorted(script.layouts):
        bound = [call.data["meta"] for call in script.of("bind_connector_meta", rank)]
        must(
            bound == made,
            expected=f"rank {rank} to be bound to every plan, in order, once",
            got=f"{len(bound)} of {len(made)} plans, or in another order",
        )
        shown = [call.data["meta"] for call in script.of("handle_preemptions", rank)]
        must(
            shown == made, expected=f"handle_preemptions of rank {rank} to get the plan of its step", got="another one"
        )


def _hooks_of_a_step(script: Script) -> None:
    """Within a step each worker's hooks come in their order; layer hooks once a layer, in the order of the layers."""
    assert script.engine is not None
    for rank, layout in sorted(script.layouts.items()):
        layers = sorted(layer for group in layout.groups for layer in group.layers)
        pairs = [(hook, layer) for layer in layers for hook in ("wait_for_layer_load", "save_kv_layer")]
        calls = [call for call in script.calls if call.rank == rank]
        for calls_of_step in _by_step(calls):
            hooks = [call.hook for call in calls_of_step]
            step = calls_of_step[-1].step
            seen = [(call.hook, call.data["layer"]) for call in calls_of_step if "layer" in call.data]
            others = [hook for hook in hooks if hook not in ("wait_for_layer_load", "save_kv_layer")]
            where = f"in step {step} of rank {rank}"
            said = _SAID[::-1] if tuple(others[4:6]) == _SAID[::-1] else _SAID
            begin = ("handle_preemptions", "bind_connector_meta", "start_load_kv", "wait_for_save")
            expected = [*begin, *said, "build_worker_report"]
            must_equal(f"the hooks {where}", others, expected)
            computes = any(part.scheduled for part in _parts(script, step))
            if script.engine.layer_hooks:
                waits = [pair for pair in pairs if pair[0] == "wait_for_layer_load"]
                fitting = [pairs, [*pairs, *waits]] if computes else [[], waits, pairs]
                must(
                    seen in fitting,
                    expected=f"wait_for_layer_load and save_kv_layer of {len(layers)} layers, in their order, {where}",
                    got=seen if computes or seen else "none",
                )
            if ("save_kv_layer", layers[-1]) in seen:
                first, last = hooks.index("wait_for_layer_load"), len(hooks) - 1 - hooks[::-1].index("save_kv_layer")
                must(
                    hooks.index("wait_for_save") > last,
                    expected=f"wait_for_save after the last layer {where}",
                    got="before it",
                )
                if _loads_in_step(script, step):
                    must(
                        hooks.index("start_load_kv") < first,
                        expected=f"start_load_kv before the forward pass {where}, which has a load for it",
                        got="after it",
                    )


def _reports(script: Script) -> None:
    """Every step's reports reach the leader once, in order, one a rank, as they were made."""
    made: dict[int, list[bytes]] = defaultdict(list)
    for rank in sorted(script.layouts):
        for call in script.of("build_worker_report", rank):
            made[call.step].append(call.data["answer"])
    given = [call.data["reports"] for call in script.of("update_connector_output")]
    open_steps = 0
    for call in script.calls:
        open_steps += (call.hook == "build_connector_meta") - (call.hook == "update_connector_output")
        must(open_steps <= 2, expected="the reports of a step before the next but one is planned", got="later")
    must(
        given == [made[step] for step in sorted(made)],
        expected="the reports of every step, one a rank, once and in the order of the steps",
        got=f"{len(given)} of {len(made)} steps, or in another order",
        hint="the commit rule: what a step saved may be offered when every rank has reported it",
    )


def _schedule(script: Script) -> None:
    """A request is new once a life; its positions follow one another; it gets every token, and pages for them."""
    size = script.layouts[0].groups[0].block_size
    told: dict[str, int] = {}  # tokens that the leader knows
    reached: dict[str, int | None] = {}  # position that the next step computes from; None before the first of a life
    loaded: dict[str, int] = {}
    computed_at: dict[str, int] = {}
    allocated: dict[str, Call] = {}
    ever: set[str] = set()  # requests that were allocated in some life
    known: dict[str, list[int]] = {}
    failed: set[str] = set()
    for call in script.calls:
        name = call.data.get("request", "")
        if call.hook == "on_new_request" or call.hook == "request_reset":
            told[name], reached[name] = len(call.data["tokens"]), None
            for of_a_life in (loaded, computed_at, allocated):
                of_a_life.pop(name, None)
            failed.discard(name)
        elif call.hook == "get_num_new_matched_tokens":
            computed_at[name] = call.data["computed"]
        elif call.hook == "update_state_after_alloc":
            if name in computed_at:  # an engine need not ask for what it will not load
                loaded[name] = computed_at[name] + call.data["external"]
            allocated[name] = call
            ever.add(name)
        elif call.hook == "get_block_ids_with_load_errors":
            failed.update(call.data["failed"])
        if "tokens" in call.data:
            _check_tokens(call, known.setdefault(name, list(call.data["tokens"])))
        for part in call.data.get("parts", ()):
            if part.new and (
                part.request_id in allocated or part.request_id not in ever
            ):  # else it goes on in its pages
                _check_allocation(part, allocated.get(part.request_id), size)
                if part.request_id not in failed and part.request_id in loaded:
                    start = loaded[part.request_id]
                    must(  # an engine may have copied a part of the next block from a page of its own
                        start <= part.computed < start + size,
                        expected=f"the first position of {part.request_id} to be {start}, or in the block there",
                        got=str(part.computed),
                    )
            _check_part(script, part, told, reached, loaded, size)
            known[part.request_id][part.num_tokens - len(part.new_tokens) :] = part.new_tokens


def _check_tokens(call: Call, known: list[int]) -> None:
    """What the leader was told of a request's tokens is what its view says, and not more of it."""
    must(
        list(call.data["tokens"][: len(known)]) == known,
        expected=f"the tokens in the view of {call.data['request']} to begin with those that it was told of",
        got=f"others in {call.hook}",
    )
    known[:] = call.data["tokens"]


def _check_allocation(part: Planned, call: Call | None, size: int) -> None:
    """The pages of a request's first step are those of `update_state_after_alloc`, and more if it waited for a load."""
    must(
        call is not None,
        expected=f"update_state_after_alloc before the first step of {part.request_id}",
        got="none",
    )
    assert call is not None
    for group, (given, table) in enumerate(zip(call.data["tables"], part.tables, strict=True)):
        needed = 0 if call.data["external"] else -(-(part.computed + part.scheduled) // size)
        must(
            len(given) >= needed,
            expected=f"all pages of {part.request_id} in its allocation",
            got=f"{len(given)} blocks",
        )
        other = [b for b, page in enumerate(given) if b >= len(table) or table[b] not in (page, -1)]
        must_equal(f"blocks of {part.request_id} in other pages than it was allocated in group {group}", other, [])


def _check_part(
    script: Script,
    part: Planned,
    told: dict[str, int],
    reached: dict[str, int | None],
    loaded: dict[str, int],
    size: int,
) -> None:
    name, end = part.request_id, part.computed + part.scheduled
    last = reached[name]
    must(
        part.new == (last is None),
        expected="a request among new_requests exactly once since it arrived or was reset",
        got=f"{name} among {'new' if part.new else 'cached'}_requests again"
        if last is not None or part.new
        else f"{name} among cached_requests at first",
    )
    must(part.scheduled > 0, expected="at least one token for a request of a step", got=f"none for {name}")
    if last is None:
        most = loaded.get(name)
        if most is not None:
            must(
                part.computed < most + size,  # it may have copied a part of a block
                expected=f"{name} to begin in the block at {most}: behind what was on the device and what was loaded",
                got=f"at {part.computed}",
            )
    else:
        must(
            part.computed == last,
            expected=f"{name} to go on at position {last}",
            got=f"at {part.computed}",
            hint="positions of one request follow one another",
        )
    reached[name] = end
    known = part.num_tokens - len(part.new_tokens)
    must(
        known == told[name],
        expected=f"new_tokens of {name} from token {told[name]} on: what the leader was not told yet",
        got=f"{len(part.new_tokens)} tokens that begin at {known}",
    )
    told[name] = part.num_tokens
    must_equal(f"block tables of {name}, one a layer group", len(part.tables), len(script.layouts[0].groups))
    for group, table in enumerate(part.tables):
        window = script.layouts[0].groups[group].window
        first = _first_needed(part.computed, size, window)
        holes = [block for block in range(first, -(-end // size)) if block >= len(table) or table[block] < 0]
        must_equal(f"blocks of {name} without a page in group {group}, which the step reads or writes", holes, [])
        pages = [page for page in table if page >= 0]
        must_equal(f"pages that {name} has twice in group {group}", len(pages) - len(set(pages)), 0)


def _parked(script: Script) -> None:
    """A parked request is in no step until every rank has named it."""
    waiting: dict[str, set[int]] = {}
    for call in script.calls:
        if call.hook == "update_state_after_alloc" and call.data["parks"]:
            waiting[call.data["request"]] = set(script.layouts)
        elif call.hook == "get_finished":
            for name in call.data["answer"].loaded:
                if name in waiting:
                    waiting[name].discard(call.rank)
        elif call.hook in ("request_reset", "request_finished"):
            waiting.pop(call.data["request"], None)
        for part in call.data.get("parts", ()):
            must(
                not waiting.get(part.request_id),
                expected=f"{part.request_id} to wait until every rank has named its load",
                got=f"a step for it while ranks {sorted(waiting.get(part.request_id, ()))} are loading",
            )
            waiting.pop(part.request_id, None)


def _failed(script: Script) -> None:
    """A request whose load failed begins again at the first bad block, or before it."""
    size = script.layouts[0].groups[0].block_size
    tables: dict[str, list[list[int]]] = {}
    bad_from: dict[str, int] = {}
    in_flight: dict[str, int] = {}  # the step that was planned last when the failure was said
    for call in script.calls:
        name = call.data.get("request", "")
        if call.hook == "update_state_after_alloc":
            tables[name] = call.data["tables"]
            bad_from.pop(name, None)  # loaded once more
        elif call.hook == "get_block_ids_with_load_errors":
            for failed in call.data["failed"]:
                pages = [
                    block
                    for table, bad in zip(tables.get(failed, ()), call.data["answer"], strict=False)
                    for block, page in enumerate(table)
                    if page in bad
                ]
                if pages:
                    bad_from[failed] = min([*pages, bad_from.get(failed, pages[0])])
                    in_flight[failed] = call.step
        elif call.hook == "request_finished":
            bad_from.pop(name, None)
        for part in call.data.get("parts", ()):
            first = bad_from.get(part.request_id)
            if first is None:
                continue
            if part.new:
                must(
                    part.computed <= first * size,
                    expected=f"{part.request_id} to be computed from block {first} on, whose load failed",
                    got=f"it goes on at position {part.computed}",
                )
                bad_from.pop(part.request_id)
            else:
                must(
                    call.data["step"] <= in_flight[part.request_id] + 2,
                    expected=f"request_reset for {part.request_id}, whose load failed",
                    got="it goes on as if nothing had been",
                )


def _saved(script: Script) -> None:
    """Every rank is given each request that waits for its saves, once, and no other."""
    waits = [call.data["request"] for call in script.of("request_finished") if call.data["answer"]]
    for rank in sorted(script.layouts):
        given = [name for call in script.of("get_finished", rank) for name in sorted(call.data["given"])]
        must_equal(
            f"finished_req_ids of rank {rank}, all steps together",
            sorted(given),
            sorted(waits),
            "each request for which request_finished answered True, once a rank",
        )


def _pages(script: Script) -> None:
    """A page that is loaded into, saved from or computed on belongs to one sequence until that has ended."""
    size = script.layouts[0].groups[0].block_size
    tokens = {name: list(prompt) for name, prompt in script.prompts.items()}
    held: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}  # (group, page) -> who holds it, for which tokens
    holders: dict[str, set[int]] = {}  # who holds pages -> ranks that have not let go

    def let_go(name: str) -> None:
        holders.pop(name, None)
        for place in [place for place, (holder, _) in held.items() if holder == name]:
            del held[place]

    def hold(name: str, tables: list[list[int]], until: int) -> None:
        holders[name] = set(script.layouts)
        for group, table in enumerate(tables):
            for block, page in enumerate(table[:until]):
                if page >= 0:
                    held[group, page] = (name, tuple(tokens[name][: (block + 1) * size]))

    for call in script.calls:
        name = call.data.get("request", "")
        if "tokens" in call.data:
            tokens[name] = list(call.data["tokens"])
        if call.hook == "update_state_after_alloc" and call.data["parks"]:
            hold(name, call.data["tables"], until=1 << 30)
        elif call.hook == "request_finished" and call.data["answer"]:
            hold(name, call.data["tables"], until=len(tokens[name]) // size)
        elif call.hook == "get_finished":
            for each in (*call.data["answer"].loaded, *call.data["answer"].saved):
                holders.get(each, set()).discard(call.rank)
            for each in [each for each, ranks in holders.items() if not ranks]:
                let_go(each)
        used: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        for part in call.data.get("parts", ()):
            mine = tokens[part.request_id]
            mine[part.num_tokens - len(part.new_tokens) :] = part.new_tokens
            end = part.computed + part.scheduled
            for group, table in enumerate(part.tables):
                for block, page in enumerate(table[: -(-end // size)]):
                    if page < 0:
                        continue
                    content = tuple(mine[: (block + 1) * size])
                    for others in (held, used):
                        holder, theirs = others.get((group, page), (part.request_id, content))
                        must(
                            holder == part.request_id or theirs == content,
                            expected=f"page {page} of group {group} to be {holder}'s until it is let go",
                            got=f"{part.request_id} computes on it in step {call.data['step']}",
                            hint="pages of a load or save in flight belong to it until every rank has named it",
                        )
                    used[group, page] = (part.request_id, content)


def _end(script: Script) -> None:
    """Both halves are shut down, and nothing is called afterwards."""
    for rank in (-1, *script.layouts):
        hooks = [call.hook for call in script.calls if call.rank == rank]
        who = "the leader" if rank < 0 else f"rank {rank}"
        must("shutdown" in hooks, expected=f"shutdown of {who}", got="none")
        after = [hook for hook in hooks[hooks.index("shutdown") :] if hook != "shutdown"]
        must_equal(f"hooks of {who} after shutdown", after, [])


def _by_step(calls: list[Call]) -> Iterator[list[Call]]:
    """Yield a rank's calls from each `handle_preemptions` to the next, without those of start and end."""
    current: list[Call] = []
    for call in calls:
        if call.hook == "handle_preemptions" and current:
            yield current
            current = []
        if call.hook == "handle_preemptions" or (current and call.hook != "shutdown"):
            current.append(call)
    if current:
        yield current


def _parts(script: Script, step: int) -> list[Planned]:
    return [
        part for call in script.of("build_connector_meta") if call.data["step"] == step for part in call.data["parts"]
    ]


def _loads_in_step(script: Script, step: int) -> bool:
    """Whether the step computes on a load that it makes."""
    calls = script.calls
    planned = next(i for i, c in enumerate(calls) if c.hook == "build_connector_meta" and c.data["step"] == step)
    computed = {part.request_id for part in calls[planned].data["parts"]}
    for call in reversed(calls[:planned]):
        if call.hook == "build_connector_meta":
            return False
        if call.hook == "update_state_after_alloc" and call.data["external"] and not call.data["parks"]:
            return call.data["request"] in computed
    return False


def _first_needed(position: int, size: int, window: int | None) -> int:
    """Return the first block that a layer reads when it computes `position`."""
    return 0 if window is None else max(0, position - window + 1) // size
