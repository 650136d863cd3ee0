"""The tag of a keyed frame: shows that somebody who knows the deployment's secret sealed it. Knows no frame."""

from __future__ import annotations

from kvconnect.errors import ConfigError

__all__ = ["TAG_BYTES", "FrameTagger"]

TAG_BYTES = 32
_CONTEXT = "kvconnect 2026-11-22 frame tag v1"
_SHORTEST = 16


class FrameTagger:
    """Makes tags under one secret; any number of threads may call it."""

    def __init__(self, secret: bytes) -> None:
        """Derive the key.

        Args:
            secret: The same for everyone who shares the stores.

        Raises:
            ConfigError: If it is short enough to be guessed from a frame, or blake3 is not installed.
        """
        if len(secret) < _SHORTEST:
            raise ConfigError(
                f"frame_secret has {len(secret)} bytes; give at least {_SHORTEST}, such as `openssl rand -hex 32` makes"
            )
        try:
            from blake3 import blake3  # late: an extra, of no use without a secret
        except ImportError as error:
            raise ConfigError('frame_secret needs blake3: pip install "kvconnect[keyed]"') from error
        self._blake3 = blake3
        self._key = blake3(secret, derive_key_context=_CONTEXT).digest()

    def tag(self, header: memoryview, payload: memoryview) -> bytes:
        """Return the tag of a frame.

        Args:
            header: What of the header the tag covers.
            payload: As it rests.
        """
        return self._blake3(header, key=self._key).update(payload).digest()

    def __repr__(self) -> str:
        """Show nothing of the key."""
        return "FrameTagger(***)"
