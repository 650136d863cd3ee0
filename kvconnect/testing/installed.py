"""Every kit for what is installed, without a line of code: ``pytest --pyargs kvconnect.testing.installed``.

Give it ``--kv-connector NAME`` (a registered name, a URL, or ``module:Class``) once or more.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvconnect.testing.claims import ClaimTests
from kvconnect.testing.faults import FaultTests
from kvconnect.testing.fit import FitTests
from kvconnect.testing.keys import KeyPartitionTests
from kvconnect.testing.kit import Kit
from kvconnect.testing.leader import LeaderTests
from kvconnect.testing.life import LifeTests
from kvconnect.testing.loads import LoadTests
from kvconnect.testing.offers import OfferTests
from kvconnect.testing.restart import RestartTests
from kvconnect.testing.saves import SaveTests
from kvconnect.testing.schedules import ScheduleTests
from kvconnect.testing.stateful import StatefulTests
from kvconnect.testing.store import StoreTests
from kvconnect.testing.suspension import SuspendTests
from kvconnect.testing.worker import WorkerTests

__all__ = ["KITS"]

KITS: dict[str, tuple[type[Kit], ...]] = {
    "store": (StoreTests,),
    "leader": (LeaderTests,),
    "worker": (WorkerTests,),
    "connector": (
        OfferTests,
        LoadTests,
        SaveTests,
        LifeTests,
        FitTests,
        ClaimTests,
        SuspendTests,
        KeyPartitionTests,
        FaultTests,
        RestartTests,
        ScheduleTests,
        StatefulTests,
    ),
}
"""What ``--kit`` chooses among; ``all`` are all of them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each kit for each ``--kv-connector``."""
    if "connector" not in metafunc.fixturenames:
        return
    named = metafunc.config.option.kv_connector
    if not named:
        raise pytest.UsageError("name what to test: --kv-connector NAME, URL or module:Class")
    metafunc.parametrize("connector", named, indirect=True, ids=named)


class _Installed:
    @pytest.fixture
    def connector(self, request: pytest.FixtureRequest) -> Any:
        """The target and the options of the command line."""
        return (request.param, json.loads(request.config.option.kv_options))


for _group, _kits in KITS.items():
    for _kit in _kits:
        _name = f"Test{_kit.__name__.removesuffix('Tests')}"
        globals()[_name] = type(_name, (_Installed, _kit), {"kv_group": _group, "__module__": __name__})
