"""Checks an opened leader or worker against the protocol, and binds its hooks. One plugin manager a half, never global.

An implementation is a plain object: each of its methods whose name is a hook is that hook, without a decorator (plain
pluggy would drop it silently). A hook without a wrapper is called as the bound method itself: 0.1 µs against 3 µs
through pluggy, and layer hooks run hundreds of times a step.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pluggy

from kvconnect.errors import PluginError

__all__ = ["bind_hooks", "hook_names"]


class _HalfManager(pluggy.PluginManager):
    """Takes undecorated methods of one implementation for hooks; wrappers carry ``@hookimpl(wrapper=True)``."""

    implementation: object = None

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        if plugin is self.implementation and not name.startswith("_") and callable(getattr(plugin, name, None)):
            return pluggy.HookimplOpts(
                wrapper=False,
                hookwrapper=False,
                optionalhook=False,
                tryfirst=False,
                trylast=False,
                specname=None,
            )
        return super().parse_hookimpl_opts(plugin, name)


def hook_names(specs: type) -> tuple[str, ...]:
    """Return the hooks that a Protocol of `hookspecs` declares, in the order of their life."""
    return tuple(name for name, member in vars(specs).items() if hasattr(member, "kvconnect_spec"))


def bind_hooks(specs: type, implementation: object, wrappers: Sequence[object] = ()) -> dict[str, Callable[..., Any]]:
    """Return, for every hook of `specs`, what to call with the hook's arguments in order.

    Args:
        specs: `LeaderHooks` or `WorkerHooks`.
        implementation: The one that does the work.
        wrappers: Observers with ``@hookimpl(wrapper=True)`` methods.

    Raises:
        PluginError: If the implementation lacks a hook, has a public method that is none, or a hook with unknown
            arguments or with default values (pluggy 1.6 and 1.7 treat those differently).
    """
    names = hook_names(specs)
    owner = type(implementation).__name__
    _check_methods(names, implementation, owner)
    manager = _HalfManager("kvconnect")
    manager.add_hookspecs(specs)
    manager.implementation = implementation
    try:
        manager.register(implementation, name=owner)
        for wrapper in wrappers:
            manager.register(wrapper)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(str(error)) from error
    for wrapper in wrappers:
        for caller in manager.get_hookcallers(wrapper) or ():
            mine = [impl for impl in caller.get_hookimpls() if impl.plugin is wrapper]
            if not all(impl.wrapper or impl.hookwrapper for impl in mine):
                raise PluginError(
                    f"{type(wrapper).__name__}.{caller.name} would answer instead of {owner}; observers carry "
                    "@hookimpl(wrapper=True)"
                )
    wrapped = {caller.name for wrapper in wrappers for caller in manager.get_hookcallers(wrapper) or ()}
    return {name: _bind(manager, specs, implementation, name, direct=name not in wrapped) for name in names}


def _bind(
    manager: pluggy.PluginManager, specs: type, implementation: object, name: str, *, direct: bool
) -> Callable[..., Any]:
    wanted = list(inspect.signature(getattr(specs, name)).parameters)[1:]
    method: Callable[..., Any] = getattr(implementation, name)
    if direct and list(inspect.signature(method).parameters) == wanted:
        return method
    caller = getattr(manager.hook, name)

    def call(*args: Any) -> Any:
        return caller(**dict(zip(wanted, args, strict=True)))

    return call


def _check_methods(names: Sequence[str], implementation: object, owner: str) -> None:
    for name in dir(implementation):
        if name.startswith("_") or not inspect.ismethod(getattr(implementation, name)):
            continue
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise PluginError(f"{owner}.{name} is no hook; the nearest is {near!r}; start private methods with '_'")
        defaults = [
            parameter.name
            for parameter in inspect.signature(getattr(implementation, name)).parameters.values()
            if parameter.default is not inspect.Parameter.empty
        ]
        if defaults:
            raise PluginError(f"{owner}.{name}: parameters of hooks have no default values: {', '.join(defaults)}")
    missing = [name for name in names if not callable(getattr(implementation, name, None))]
    if missing:
        raise PluginError(f"{owner} has no {missing[0]!r}; subclass kvconnect.Leader or kvconnect.Worker")
