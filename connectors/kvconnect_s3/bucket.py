"""The requests that the store makes, through obstore. Knows no keys; its errors hold no secrets.

obstore's messages quote what a server answered, and a server may quote what was signed, session tokens included. So of
its errors only the HTTP status and the S3 error code pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kvconnect.errors import ConfigError, KVConnectError, StoreUnavailable
from kvconnect_s3.options import S3Options

__all__ = ["Bucket", "Listed"]

_INSTALL = 'pip install "kvconnect[s3]"'
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
# One request of 16 MiB went at 0.13 GB/s into Ceph's gateway, parts of 5 MiB at 0.07; beyond, parts can be sent again.
_MULTIPART_BYTES = 64 << 20
_PART_BYTES = 16 << 20
_REQUESTS = 32  # of one instance at once


class Listed(NamedTuple):
    """An object that a listing names, by its path under the prefix; `modified` by the server's clock."""

    path: str
    modified: datetime


class Bucket:
    """Objects under one prefix of one bucket. Coroutines; cancelling one ends its request."""

    def __init__(self, options: S3Options, timeout_s: float) -> None:
        """Prepare a client; sends nothing.

        Args:
            options: Where, and as whom.
            timeout_s: Seconds of the longest call; no request takes longer.

        Raises:
            ConfigError: If obstore or boto3 is missing, or refuses an option.
        """
        try:
            import obstore
            from obstore.store import S3Store as Client
        except ImportError:
            raise ConfigError(f"s3 needs obstore: {_INSTALL}") from None
        self._obstore = obstore
        self.where = f"{options.host!r} at {_place(options.endpoint)}"
        self._slots = asyncio.Semaphore(_REQUESTS)
        given = {
            "endpoint": options.endpoint,
            "region": options.region,
            "access_key_id": options.access_key_id,
            "secret_access_key": str(options.secret_access_key),
            "session_token": str(options.session_token),
        }
        config: Any = {name: value for name, value in given.items() if value}
        if options.virtual_hosted:
            config["virtual_hosted_style_request"] = True
        client: Any = {
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=min(5.0, timeout_s / 3)),
        }
        if options.allow_http or options.endpoint.startswith("http://"):
            client["allow_http"] = True
        try:
            self._client = Client(
                options.host,
                prefix=options.path.strip("/") or None,
                config=config,
                client_options=client,
                retry_config={
                    "max_retries": 5,
                    "retry_timeout": timedelta(seconds=timeout_s),
                    "backoff": {
                        "init_backoff": timedelta(seconds=0.05),
                        "max_backoff": timedelta(seconds=1),
                        "base": 2,
                    },
                },
                credential_provider=_profile(options),
            )
        except KVConnectError:
            raise
        except Exception as error:  # obstore's own kinds; their text may quote an option
            raise ConfigError(f"s3 {self.where}: obstore refuses the options ({type(error).__name__})") from None

    async def create(self, path: str, data: bytes) -> bool:
        """Put an object where there is none; False if there is one, which may be this one, sent twice."""
        with self._errors("PUT"):
            try:
                async with self._slots:
                    await self._obstore.put_async(self._client, path, data, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
        return True

    async def put(self, path: str, data: bytes | memoryview) -> None:
        """Put an object, in parts if it is large; `data` is not looked at any more when this returns."""
        with self._errors("PUT"):
            async with self._slots:
                large = len(data) > _MULTIPART_BYTES
                await self._obstore.put_async(
                    self._client, path, data, use_multipart=large, chunk_size=_PART_BYTES, max_concurrency=4
                )

    async def exists(self, path: str) -> bool:
        """Say whether there is an object; False also if there is no bucket.

        HEAD, because where a gateway leaves Nagle's algorithm on, as Ceph's does, a GET of what is absent takes 44 ms
        until its body has followed the header, and this takes 1.5.
        """
        with self._errors("HEAD"):
            try:
                async with self._slots:
                    await self._obstore.head_async(self._client, path)
            except FileNotFoundError:
                return False
        return True

    async def get(self, path: str, limit: int) -> memoryview | None:
        """Return an object whole, None if it is absent; one of more than `limit` bytes is empty."""
        with self._errors("GET"):
            try:
                async with self._slots:
                    found = await self._obstore.get_async(self._client, path)
                    return memoryview(await found.bytes_async() if found.meta["size"] <= limit else b"")
            except FileNotFoundError as error:
                self._must_have_a_bucket(error)
                return None

    async def get_range(self, path: str, start: int, end: int) -> memoryview | None:
        """Return bytes ``[start, end)`` of an object, fewer if it is shorter; None if it is absent."""
        with self._errors("GET"):
            try:
                async with self._slots:
                    return memoryview(await self._obstore.get_range_async(self._client, path, start=start, end=end))
            except FileNotFoundError as error:
                self._must_have_a_bucket(error)
                return None
            except self._obstore.exceptions.BaseError as error:
                if _found(_STATUS, error) == "416":  # it begins behind the object's end
                    return memoryview(b"")
                raise

    async def listing(self, folder: str, after: str | None = None) -> AsyncIterator[Listed]:
        """Yield the objects under ``folder/``, those behind the path `after` if it is given."""
        with self._errors("LIST"):
            async for chunk in self._obstore.list(self._client, folder, offset=after, chunk_size=1000):
                for meta in chunk:
                    yield Listed(meta["path"], meta["last_modified"])

    async def delete(self, paths: list[str]) -> None:
        """Delete objects."""
        with self._errors("DELETE"):
            async with self._slots:
                await self._obstore.delete_async(self._client, paths)

    @contextlib.contextmanager
    def _errors(self, method: str) -> Iterator[None]:
        try:
            yield
        except KVConnectError:
            raise
        except Exception as error:
            raise self._error(method, error) from None

    def _error(self, method: str, error: Exception) -> KVConnectError:
        kinds = self._obstore.exceptions
        status, code = _found(_STATUS, error), _found(_CODE, error)
        what = " ".join(part for part in (method, status, code) if part)
        if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and method in ("PUT", "LIST")):
            return ConfigError(f"s3: there is no bucket {self.where} ({what}); make it first")
        if isinstance(error, (kinds.PermissionDeniedError, kinds.UnauthenticatedError)) or status in ("401", "403"):
            return ConfigError(
                f"s3: access to {self.where} is denied ({what}); look at the credentials and their rights"
            )
        if isinstance(error, kinds.InvalidPathError):
            return ConfigError("s3: the prefix cannot be part of an object's name")
        if "169.254." in str(error):  # where instances ask for their role: the last resort for credentials
            return ConfigError(
                f"s3: no credentials for {self.where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
                "access_key_id and secret_access_key, or profile"
            )
        return StoreUnavailable(f"s3: {self.where} does not answer as it should ({what or type(error).__name__})")

    def _must_have_a_bucket(self, error: FileNotFoundError) -> None:
        """An absent object is an answer, an absent bucket is none."""
        if _found(_CODE, error) == "NoSuchBucket":
            raise error


def _found(pattern: re.Pattern[str], error: Exception) -> str:
    match = pattern.search(str(error))
    return match[1] if match else ""


def _place(endpoint: str) -> str:
    """Return host and port alone: a URL can hold a password."""
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return urlsplit(endpoint).netloc.rpartition("@")[2] or "AWS"


def _profile(options: S3Options) -> Any:
    """Return what fetches a profile's credentials, None if no profile is asked for.

    Raises:
        ConfigError: If boto3 is missing, or knows no such profile.
    """
    name = options.profile
    if not name and not options.access_key_id and not os.environ.get("AWS_ACCESS_KEY_ID"):
        name = os.environ.get("AWS_PROFILE", "")
    if not name:
        return None
    try:
        boto3 = importlib.import_module("boto3")  # it has no types
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise ConfigError(f"s3: profile {name!r} needs boto3: pip install boto3") from None
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=name))
    except Exception as error:
        raise ConfigError(f"s3: profile {name!r} gives no credentials ({type(error).__name__})") from None
