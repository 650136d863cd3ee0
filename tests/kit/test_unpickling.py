"""Who may unpickle while a kit runs: the modules that it names, and nobody else."""

import pickle
from types import ModuleType

import pytest

from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import BrokenPromise


def module(name: str) -> ModuleType:
    made = ModuleType(name)
    exec("import pickle\ndef load(data): return pickle.loads(data)", made.__dict__)
    return made


class TestKit(Kit):
    may_unpickle = ("an.engine",)

    def test_named_module_may_and_others_may_not(self, unpickled: list[str]) -> None:
        data = pickle.dumps([1, 2])
        assert module("an.engine").load(data) == [1, 2]
        for name in ("an", "an.engine.below", "a_store"):
            with pytest.raises(BrokenPromise, match="no pickle"):
                module(name).load(data)
        assert unpickled == ["pickle.loads"] * 3
        unpickled.clear()
