"""Every error kvconnect raises on purpose, and nothing else.

KVConnectError
 x ConfigError (ValueError)          a setting is missing, unknown or contradictory
 x PluginError
   + UnknownConnector (LookupError)  no such name; lists the installed ones
   + DuplicateConnector              two distributions claim one name
   + ProtocolMismatch                written for another protocol version
 x LayoutMismatch (ValueError)       tensors do not have the agreed shape, dtype or strides
 x MetadataError (ValueError)        a message that cannot be decoded, or of an unknown version
 x StoreError
   + StoreUnavailable (ConnectionError)
   + StoreFull (OSError)
   + FrameCorrupt (ValueError)       a frame that is torn, foreign, or fails its checksum
 x UnsupportedError (NotImplementedError)  asked for a capability that is not there
 x Closed (RuntimeError)             used after shutdown

A miss is a value, a failed load is a report; only bugs and bad input are exceptions.
"""

__all__ = [
    "Closed",
    "ConfigError",
    "DuplicateConnector",
    "FrameCorrupt",
    "KVConnectError",
    "LayoutMismatch",
    "MetadataError",
    "PluginError",
    "ProtocolMismatch",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "UnknownConnector",
    "UnsupportedError",
]


class KVConnectError(Exception):
    """Base of everything kvconnect raises on purpose."""


class ConfigError(KVConnectError, ValueError):
    """A setting is missing, unknown or contradictory."""


class PluginError(KVConnectError):
    """A plugin cannot be loaded or does not follow the protocol."""


class UnknownConnector(PluginError, LookupError):
    """No connector or store is registered under this name.

    Attributes:
        name: What was asked for.
        known: The registered names, sorted.
    """

    def __init__(self, message: str, *, name: str, known: tuple[str, ...]) -> None:
        """Keep the name asked for and the known ones beside the message."""
        super().__init__(message)
        self.name = name
        self.known = known


class DuplicateConnector(PluginError):
    """Two plugins claim one name or one URL scheme."""


class ProtocolMismatch(PluginError):
    """A plugin was written for a protocol version this kvconnect does not speak."""


class LayoutMismatch(KVConnectError, ValueError):
    """Tensors do not have the agreed shape, dtype or strides."""


class MetadataError(KVConnectError, ValueError):
    """A message cannot be decoded, or is of an unknown version."""


class StoreError(KVConnectError):
    """A store could not do what it was asked."""


class StoreUnavailable(StoreError, ConnectionError):
    """The medium cannot be reached; trying again later may help."""


class StoreFull(StoreError, OSError):
    """The medium has no room and nothing more can be evicted."""


class FrameCorrupt(StoreError, ValueError):
    """A stored frame is torn, foreign, or fails its checksum."""


class UnsupportedError(KVConnectError, NotImplementedError):
    """Asked for a capability that this part does not declare."""


class Closed(KVConnectError, RuntimeError):
    """Used after shutdown."""
