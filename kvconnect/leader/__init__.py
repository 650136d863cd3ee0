"""The scheduler-side half: hashes, looks up, decides, emits plans. Pure Python; never touches a tensor."""

from kvconnect.leader.base import Leader
from kvconnect.leader.chains import RequestChains
from kvconnect.leader.offload import OffloadLeader

__all__ = ["Leader", "OffloadLeader", "RequestChains"]
