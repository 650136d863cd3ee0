"""The driver: whatever a connector raises or returns, the engine gets an answer that it can live with."""

from typing import Any

import pytest

from kvconnect import Capabilities, EngineCapabilities, Leader, Worker, hookimpl
from kvconnect.driver import LeaderDriver, WorkerDriver
from kvconnect.errors import PluginError, UnsupportedError
from kvconnect.hooks import bind_hooks, hook_names
from kvconnect.protocol import (
    Finished,
    LeaderHooks,
    Match,
    Plan,
    Report,
    RequestView,
    SchedulerOutput,
    WorkerHooks,
    check_fit,
)

VIEW = RequestView(request_id="a", tokens=list(range(20)), num_prompt_tokens=20)
META = Plan(step=3).encode()


def leader_driver(**hooks: Any) -> LeaderDriver:
    return LeaderDriver(type("Half", (Leader,), hooks)(), block_size=4)


def worker_driver(**hooks: Any) -> WorkerDriver:
    return WorkerDriver(type("Half", (Worker,), hooks)())


def raising(specs: type) -> dict[str, Any]:
    """Return methods with the right signatures that all raise."""
    import inspect

    members: dict[str, Any] = {}
    for name in hook_names(specs):
        parameters = list(inspect.signature(getattr(specs, name)).parameters)
        scope: dict[str, Any] = {}
        exec(f"def {name}({', '.join(parameters)}):\n    raise RuntimeError('boom')", scope)
        members[name] = scope[name]
    return members


def test_leader_whose_every_hook_raises_costs_nothing_but_speed() -> None:
    driver = leader_driver(**raising(LeaderHooks))
    driver.set_handshake_metadata([b""])
    driver.on_new_request(VIEW)
    assert driver.get_num_new_matched_tokens(VIEW, 0) == Match(0, False)
    driver.update_state_after_alloc(VIEW, [[]], 0)
    driver.cancel_load(VIEW, 0, 4)
    assert driver.build_connector_meta(SchedulerOutput(step=0)) is None
    driver.update_connector_output([b""])
    assert driver.request_finished(VIEW, [[]]) is False
    driver.request_reset(VIEW)
    assert driver.has_pending_work() is False
    assert list(driver.take_events()) == []
    assert driver.reset_cache() is False
    failures = driver.get_stats()["hooks"]["failures"]
    assert failures["leader.get_num_new_matched_tokens"] == 1
    assert len(failures) == 13
    driver.shutdown()
    driver.shutdown()


def test_worker_whose_every_hook_raises_fails_its_loads_and_reports_nothing() -> None:
    driver = worker_driver(**raising(WorkerHooks))
    assert driver.get_handshake_metadata() == b""
    driver.bind(META, 4)
    driver.start_load_kv()
    driver.wait_for_layer_load(0)
    driver.save_kv_layer(0)
    driver.wait_for_save()
    assert driver.get_finished(frozenset()) == Finished(frozenset(), frozenset(), frozenset())
    assert driver.get_block_ids_with_load_errors() is None
    assert Report.decode(driver.build_worker_report()).unbound_step == 4
    driver.shutdown()


@pytest.mark.parametrize("hook", ["start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"])
def test_step_hook_that_raises_fails_the_steps_loads_and_marks_the_report(hook: str) -> None:
    driver = worker_driver(**{hook: raising(WorkerHooks)[hook]})
    driver.bind(META, 4)
    driver.start_load_kv()
    driver.wait_for_layer_load(0)
    driver.save_kv_layer(0)
    driver.wait_for_save()
    assert driver.get_block_ids_with_load_errors() is None
    report = Report.decode(driver.build_worker_report())
    assert (report.step, report.error) == (3, f"{hook}: RuntimeError: boom")
    driver.bind(Plan(step=4).encode(), 4)
    assert driver.get_block_ids_with_load_errors() is not None  # the next step starts clean
    assert Report.decode(driver.build_worker_report()).error == ""


def test_step_without_a_plan_calls_no_worker_hook() -> None:
    driver = worker_driver(start_load_kv=boom_named("start_load_kv"), wait_for_save=boom_named("wait_for_save"))
    driver.bind(None, 4)
    driver.start_load_kv()
    driver.wait_for_save()
    assert driver.get_block_ids_with_load_errors() is None
    assert Report.decode(driver.build_worker_report()) == Report.unbound(4, 0, "no plan")
    assert driver.get_stats()["hooks"]["failures"] == {}


def boom_named(name: str) -> Any:
    return raising(WorkerHooks)[name]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        8,
        (8,),
        Match(0, True),
        Match(None, True),
        Match(-4, False),
        Match(6, False),
        Match(20, False),
        Match(8, True),
        ("8", False),
    ],
    ids=str,
)
def test_answer_that_breaks_the_rules_is_no_match(answer: Any) -> None:
    def ask(self: Any, request: Any, num_computed_tokens: Any) -> Any:
        return answer

    driver = leader_driver(get_num_new_matched_tokens=ask)
    assert driver.get_num_new_matched_tokens(VIEW, 0) == Match(0, False)
    assert driver.get_stats()["hooks"]["failures"] == {"leader.get_num_new_matched_tokens": 1}


@pytest.mark.parametrize("answer", [Match(16, False), Match(None, False), Match(0, False), Match(16, True)])
def test_answer_that_keeps_the_rules_passes(answer: Match) -> None:
    def ask(self: Any, request: Any, num_computed_tokens: Any) -> Any:
        return answer

    leader = type("Half", (Leader,), {"get_num_new_matched_tokens": ask})()
    driver = LeaderDriver(leader, block_size=4, async_load=True)
    assert driver.get_num_new_matched_tokens(VIEW, 0) == answer


def test_public_method_that_is_no_hook_is_refused_with_the_nearest() -> None:
    def start_load_kvs(self: Any) -> None: ...

    with pytest.raises(PluginError, match=r"start_load_kvs is no hook; the nearest is 'start_load_kv'"):
        worker_driver(start_load_kvs=start_load_kvs)


def test_default_value_in_a_hook_is_refused() -> None:
    def save_kv_layer(self: Any, layer: int = 0) -> None: ...

    with pytest.raises(PluginError, match="default values: layer"):
        worker_driver(save_kv_layer=save_kv_layer)


def test_unknown_argument_is_refused() -> None:
    def save_kv_layer(self: Any, layer: int, tensor: Any) -> None: ...

    with pytest.raises(PluginError, match="tensor"):
        worker_driver(save_kv_layer=save_kv_layer)


def test_object_that_lacks_hooks_is_refused() -> None:
    with pytest.raises(PluginError, match="subclass"):
        bind_hooks(WorkerHooks, object())


def test_hook_without_wrapper_is_the_bound_method_itself() -> None:
    worker = Worker()
    assert bind_hooks(WorkerHooks, worker)["save_kv_layer"] == worker.save_kv_layer


def test_hook_may_take_fewer_arguments() -> None:
    class Short(Leader):
        def request_finished(self, request: Any) -> bool:  # type: ignore[override]  # pluggy allows it
            return True

    driver = LeaderDriver(Short(), block_size=4)  # type: ignore[arg-type]  # as above
    assert driver.request_finished(VIEW, [[]]) is True


def test_wrapper_sees_calls_and_results() -> None:
    seen: list[Any] = []

    class Watch:
        @hookimpl(wrapper=True)
        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: Any) -> Any:
            match = yield
            seen.append((request.request_id, num_computed_tokens, match))
            return match

    class Offers(Leader):
        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Match:
            return Match(8, False)

    driver = LeaderDriver(Offers(), block_size=4, wrappers=[Watch()])
    assert driver.get_num_new_matched_tokens(VIEW, 4) == Match(8, False)
    assert seen == [("a", 4, Match(8, False))]


def test_observer_that_would_answer_is_refused() -> None:
    class Usurper:
        @hookimpl
        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: Any) -> Any:
            return Match(16, False)

    with pytest.raises(PluginError, match="would answer instead of Leader"):
        LeaderDriver(Leader(), block_size=4, wrappers=[Usurper()])


def test_wrong_number_of_groups_fails_the_steps_loads() -> None:
    def get_block_ids_with_load_errors(self: Any) -> Any:
        return [set(), set(), set()]

    driver = worker_driver(get_block_ids_with_load_errors=get_block_ids_with_load_errors)
    driver.bind(META, 4)
    assert driver.get_block_ids_with_load_errors() is None


def test_connector_that_does_not_fit_is_refused_with_the_reason() -> None:
    needs = Capabilities(needs=("handshake", "reports"))
    with pytest.raises(UnsupportedError, match="'x' needs an engine with reports"):
        check_fit("x", needs, EngineCapabilities(handshake=True), num_ranks=1)
    with pytest.raises(UnsupportedError, match="serves one rank"):
        check_fit("x", Capabilities(), EngineCapabilities(), num_ranks=2)
    with pytest.raises(UnsupportedError, match="serves one layer group"):
        check_fit("x", Capabilities(), EngineCapabilities(), num_ranks=1, num_groups=2)
    check_fit("x", needs, EngineCapabilities(handshake=True, reports=True), num_ranks=1)


def test_default_bodies_do_nothing_and_break_nothing() -> None:
    leader, worker = leader_driver(), worker_driver()
    leader.on_new_request(VIEW)
    assert leader.get_num_new_matched_tokens(VIEW, 0) == Match(0, False)
    meta = leader.build_connector_meta(SchedulerOutput(step=7))
    worker.bind(meta, 0)
    worker.start_load_kv()
    worker.wait_for_save()
    assert worker.get_block_ids_with_load_errors() == []
    assert Report.decode(worker.build_worker_report()).step == 7
    assert leader.get_stats()["hooks"]["failures"] == worker.get_stats()["hooks"]["failures"] == {}
