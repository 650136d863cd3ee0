"""Conformance kits: prove a store or a connector right, with one fixture or without a line of code.

Subclass a kit and give it a fixture named ``connector`` (`EngineTests`: ``engine``); or run ``kvconnect conformance
TARGET``. `ConnectorTests` are the kits of both halves in one class. Needs ``pip install "kvconnect[test]"``. What each
test promises is in ``docs/conformance.md``.
"""

from kvconnect.testing.claims import ClaimTests
from kvconnect.testing.connector import ConnectorTests
from kvconnect.testing.engine import EngineTests
from kvconnect.testing.engines import EngineSetting, EngineUnderTest
from kvconnect.testing.faults import FaultTests
from kvconnect.testing.fit import FitTests
from kvconnect.testing.keys import KeyPartitionTests
from kvconnect.testing.leader import LeaderTests
from kvconnect.testing.life import LifeTests
from kvconnect.testing.loads import LoadTests
from kvconnect.testing.offers import OfferTests
from kvconnect.testing.promise import BrokenPromise
from kvconnect.testing.restart import RestartTests
from kvconnect.testing.saves import SaveTests
from kvconnect.testing.schedules import ScheduleTests
from kvconnect.testing.stateful import StatefulTests
from kvconnect.testing.store import StoreTests
from kvconnect.testing.suspension import SuspendTests
from kvconnect.testing.worker import WorkerTests

__all__ = [
    "BrokenPromise",
    "ClaimTests",
    "ConnectorTests",
    "EngineSetting",
    "EngineTests",
    "EngineUnderTest",
    "FaultTests",
    "FitTests",
    "KeyPartitionTests",
    "LeaderTests",
    "LifeTests",
    "LoadTests",
    "OfferTests",
    "RestartTests",
    "SaveTests",
    "ScheduleTests",
    "StatefulTests",
    "StoreTests",
    "SuspendTests",
    "WorkerTests",
]
