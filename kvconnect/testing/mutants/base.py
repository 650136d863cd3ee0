"""What a mutant is: a class that is right but for one mistake, and the kit's test that must catch it.

    @mutant(OfferTests.test_offer_counts_from_what_is_computed, "count from num_computed_tokens")
    class CountsFromZero(Right):
        "Forgets what is computed already."

Decorate twice what two tests must catch. The class's docstring says the mistake.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from kvconnect.leader import OffloadLeader
from kvconnect.options import ByteSize, Options
from kvconnect.protocol import Capabilities, Connector
from kvconnect.worker import OffloadWorker

__all__ = ["MUTANTS", "Mutant", "Right", "RightOptions", "leader", "mutant", "worker"]

T = TypeVar("T", bound=type)


class Mutant(NamedTuple):
    """One mistake and who must find it.

    Attributes:
        kind: A store, a connector or an engine; the class it derives from is right.
        rule: The kit's test, as the kit has it.
        says: A regular expression that the broken promise must match: it leads the author to the mistake.
        over: Stores below a connector.
        parameters: Of the test, by name; the others take the first of their values. ``seed`` of a random schedule, too.
        deadline_s: Seconds for the test; small for a mutant that hangs.
    """

    kind: type
    rule: Callable[..., None]
    says: str
    over: tuple[type, ...]
    parameters: Mapping[str, Any]
    deadline_s: float

    @property
    def kit(self) -> str:
        """The name of the kit that has the rule."""
        return self.rule.__qualname__.split(".")[0]

    @property
    def mistake(self) -> str:
        """What it does wrong, in a sentence."""
        return (inspect.getdoc(self.kind) or "").split("\n")[0]

    @property
    def right(self) -> type:
        """The class that it was made from: the next one that is neither a mutant nor a helper of theirs."""
        return next(kind for kind in self.kind.__mro__ if kind not in _kinds() and kind.__name__[0] != "_")


MUTANTS: list[Mutant] = []
"""Every mutant of this package, in the order of their modules."""


def mutant(
    rule: Callable[..., None],
    says: str,
    *,
    over: Sequence[type] = (),
    parameters: Mapping[str, Any] | None = None,
    deadline_s: float = 45.0,
) -> Callable[[T], T]:
    """Register the class below as a mutant that `rule` must catch; the arguments are those of `Mutant`."""
    re.compile(says)

    def register(kind: T) -> T:
        assert kind.__doc__, f"{kind.__name__} needs a docstring: its mistake"
        MUTANTS.append(Mutant(kind, rule, says, tuple(over), parameters or {}, deadline_s))
        return kind

    return register


def _kinds() -> set[type]:
    return {each.kind for each in MUTANTS}


class RightOptions(Options, frozen=True):
    """Options of `Right`."""

    capacity: ByteSize = ByteSize("4MiB")


class Right(Connector):
    """The offload connector itself, with halves that a subclass can replace."""

    Options = RightOptions
    capabilities = Capabilities(
        async_load=True,
        several_groups=True,
        several_ranks=True,
        batch_claim=True,
        suspend=True,
        needs=("handshake", "reports"),
    )
    leader: type[OffloadLeader] = OffloadLeader
    worker: type[OffloadWorker] = OffloadWorker

    def make_leader(self, options: Any, context: Any) -> Any:
        """Make the leader."""
        return self.leader(context)

    def make_worker(self, options: Any, context: Any) -> Any:
        """Make one rank's worker."""
        return self.worker(context, capacity=options.capacity)


def leader(**members: Any) -> type[OffloadLeader]:
    """Return the offload leader with other methods."""
    return type("Leader", (OffloadLeader,), members)


def worker(**members: Any) -> type[OffloadWorker]:
    """Return the offload worker with other methods."""
    return type("Worker", (OffloadWorker,), members)
