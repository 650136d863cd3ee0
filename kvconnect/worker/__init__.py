"""The model-runner-side half: moves bytes between the paged cache, the arena and the stores. Needs torch."""

from kvconnect.worker.base import Worker
from kvconnect.worker.offload import OffloadWorker

__all__ = ["OffloadWorker", "Worker"]
