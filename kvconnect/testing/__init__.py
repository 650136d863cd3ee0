"""Conformance kits: prove a store or a connector right, with one fixture or without a line of code.

Subclass a kit and give it a fixture named ``connector``; or run ``kvconnect conformance TARGET``. Needs
``pip install "kvconnect[test]"``. What each test promises is in ``docs/conformance.md``.
"""

from kvconnect.testing.connector import ConnectorTests
from kvconnect.testing.faults import FaultTests
from kvconnect.testing.keys import KeyPartitionTests
from kvconnect.testing.leader import LeaderTests
from kvconnect.testing.promise import BrokenPromise
from kvconnect.testing.restart import RestartTests
from kvconnect.testing.stateful import StatefulTests
from kvconnect.testing.store import StoreTests
from kvconnect.testing.worker import WorkerTests

__all__ = [
    "BrokenPromise",
    "ConnectorTests",
    "FaultTests",
    "KeyPartitionTests",
    "LeaderTests",
    "RestartTests",
    "StatefulTests",
    "StoreTests",
    "WorkerTests",
]
