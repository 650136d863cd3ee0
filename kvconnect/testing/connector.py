"""Both halves under an engine: what is offered, loaded and saved, and that nothing is left over."""

from __future__ import annotations

from kvconnect.testing.claims import ClaimTests
from kvconnect.testing.fit import FitTests
from kvconnect.testing.life import LifeTests
from kvconnect.testing.loads import LoadTests
from kvconnect.testing.offers import OfferTests
from kvconnect.testing.saves import SaveTests
from kvconnect.testing.schedules import ScheduleTests
from kvconnect.testing.suspension import SuspendTests

__all__ = ["ConnectorTests"]


class ConnectorTests(OfferTests, LoadTests, SaveTests, LifeTests, FitTests, ClaimTests, SuspendTests, ScheduleTests):
    """The promises that need a leader, workers and steps."""
