"""Runs any kvconnect connector under vLLM: translates vLLM's connector calls to our hooks, and nothing else.

    KVTransferConfig(kv_connector="KVConnect", kv_role="kv_both", kv_load_failure_policy="recompute",
                     kv_connector_extra_config={"connector": ["host://?capacity=4GiB", "disk:///var/cache/kv"]})

vLLM finds the name through the entry point `vllm.general_plugins`; where plugins are switched off,
``kv_connector_module_path="kvconnect_vllm"`` does the same.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["KVConnect", "register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """Make ``kv_connector="KVConnect"`` known to vLLM. Idempotent, imports nothing heavy, never raises."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        # under the class's own name: MultiConnector looks its children up by it
        KVConnectorFactory.register_connector("KVConnect", "kvconnect_vllm.connector", "KVConnect")
    except ValueError:
        pass  # it is known already
    except Exception:
        logger.exception("kvconnect cannot register with this vLLM; kv_connector_module_path='kvconnect_vllm' may work")


def __getattr__(name: str) -> Any:
    """Import the connector when it is asked for: vLLM loads plugins in processes that never use it."""
    if name == "KVConnect":
        from kvconnect_vllm.connector import KVConnect

        return KVConnect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
