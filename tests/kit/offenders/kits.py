"""The installed kits once more, for offenders: `pytest --pyargs tests.kit.offenders.kits --kv-connector MODULE:CLASS`.

Beside them stands what installed kits cannot know: how an offender names blocks, and that one of them may unpickle, so
that its other faults are seen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvconnect.testing.harness import BLOCK
from kvconnect.testing.installed import KITS, pytest_generate_tests
from kvconnect.testing.promise import must
from kvconnect.testing.target import Target
from tests.kit.offenders.described import MAY_UNPICKLE

__all__ = ["pytest_generate_tests"]


class _Offender:
    @pytest.fixture
    def connector(self, request: pytest.FixtureRequest) -> Any:
        return (request.param, {})

    @pytest.fixture
    def target(self, connector: Any, tmp_path: Path, patience_s: float) -> Target:
        """The same model each time, so that two runs say the same."""
        target = Target(connector, tmp_path, patience_s=patience_s)
        target.model = "id:offender"
        return target

    @pytest.fixture
    def keys(self, connector: Any) -> Callable[[Sequence[int], dict[str, Any]], list[bytes]]:
        """What the offender's module says of the names of blocks."""
        names = importlib.import_module(connector[0].split(":")[0]).keys
        return lambda tokens, extras: names(tokens, BLOCK)

    @pytest.fixture(autouse=True)
    def no_pickle(self, connector: Any, unpickled: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        if connector[0] in MAY_UNPICKLE:
            monkeypatch.undo()  # the kit has forbidden it, nothing else was changed so far
        yield
        must(not unpickled, expected="no pickle, anywhere", got=f"calls of {', '.join(sorted(set(unpickled)))}")


for _group, _kits in KITS.items():
    for _kit in _kits if _group != "store" else ():
        _name = f"Test{_kit.__name__.removesuffix('Tests')}"
        globals()[_name] = type(_name, (_Offender, _kit), {"kv_group": _group, "__module__": __name__})
