"""What users may set for ``s3://``."""

from __future__ import annotations

from kvconnect.errors import ConfigError
from kvconnect.options import Options, Secret

__all__ = ["S3Options"]


class S3Options(Options, frozen=True):
    """Options of ``s3://``. What is not given comes from the environment (``AWS_*``), as the AWS tools have it.

    Credentials: `access_key_id` and `secret_access_key`, or `profile`, or ``AWS_ACCESS_KEY_ID`` and its companions, or
    ``AWS_PROFILE``, or a web identity (``AWS_WEB_IDENTITY_TOKEN_FILE``), or a container's or instance's role.

    Attributes:
        host: The bucket; in a URL what stands behind ``//``. It has to be there.
        path: The prefix of everything that is written.
        endpoint: Such as ``http://127.0.0.1:9000``; AWS's own if none is given.
        region: Such as ``us-east-1``.
        access_key_id: With `secret_access_key`.
        secret_access_key: With `access_key_id`.
        session_token: Of temporary credentials.
        profile: A profile of the AWS configuration files; needs boto3.
        virtual_hosted: Name the bucket in the host, not in the path; `endpoint` has to include it.
        allow_http: Allow requests without TLS. An `endpoint` that is given with ``http://`` allows them by itself.
        index_blocks: Blocks that one instance knows of, about 300 bytes of memory each; the oldest are forgotten.
    """

    host: str
    path: str = ""
    endpoint: str = ""
    region: str = ""
    access_key_id: str = ""
    secret_access_key: Secret = Secret("")
    session_token: Secret = Secret("")
    profile: str = ""
    virtual_hosted: bool = False
    allow_http: bool = False
    index_blocks: int = 1_000_000

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: If the bucket is missing, a key has no companion, or nothing may be known.
        """
        if not self.host:
            raise ConfigError("s3 needs a bucket: s3://bucket/prefix")
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ConfigError("s3: access_key_id and secret_access_key go together")
        if self.index_blocks < 1:
            raise ConfigError(f"s3: index_blocks must be at least 1, not {self.index_blocks}")
