"""The ``kvconnect`` command."""
