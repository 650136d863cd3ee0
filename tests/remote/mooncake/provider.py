"""Gives memory to a Mooncake pool until it is killed: ``python provider.py MASTER_PORT BYTES``."""

import sys
import threading

from mooncake.store import MooncakeDistributedStore

_master, _size = sys.argv[1:]
_store = MooncakeDistributedStore()
if code := _store.setup("127.0.0.1", "P2PHANDSHAKE", int(_size), 0, "tcp", "", f"127.0.0.1:{_master}"):
    sys.exit(f"setup: {code}")
print("provides", flush=True)
threading.Event().wait()
