"""Reads the command line and runs a command. Imports neither torch nor a connector before it must."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from kvconnect.errors import KVConnectError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``kvconnect``.

    Returns:
        The exit status: 0 for success, 1 if the command's check failed, 2 if it could not run.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "plugins":
            from kvconnect.cli.plugins import run_plugins  # late: a command loads what it needs

            return run_plugins(as_json=options.json)
        from kvconnect.cli.demo import DemoOptions, run_demo

        return run_demo(
            DemoOptions(
                model=options.model,
                prompts=options.prompts,
                connector=tuple(options.connector or ()),
                block_size=options.block_size,
                max_tokens=options.max_tokens,
                kv_cache_bytes=options.kv_cache_bytes,
            ),
            as_json=options.json,
        )
    except KVConnectError as error:
        print(f"kvconnect {options.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "transformers"):
            raise
        extra = "cli" if error.name == "rich" else "engine"
        print(f'kvconnect {options.command} needs {error.name}: pip install "kvconnect[{extra}]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvconnect", description="Connectors for the KV caches of LLM engines.")
    version = importlib.metadata.version("kvconnect")
    parser.add_argument("--version", action="version", version=f"kvconnect {version}")
    commands = parser.add_subparsers(dest="command", required=True)
    plugins = commands.add_parser("plugins", help="list connectors, stores and who brought them")
    plugins.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo = commands.add_parser(
        "demo",
        help="compute the KV cache of prompts in one process, load it in another",
        description="Runs the prompts in a cold process that saves its KV cache, then in a warm one that loads it, and "
        "compares both with model.generate(). Exit status 0 only if the outputs are equal and something was loaded.",
    )
    demo.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: an embedded tiny Llama)")
    demo.add_argument("--prompts", metavar="FILE", help="text, one prompt a paragraph, or JSON lines with 'input'")
    demo.add_argument(
        "--connector",
        metavar="URL",
        action="append",
        help="where to keep the cache; repeat it for tiers (default: disk:// in a temporary folder)",
    )
    demo.add_argument("--block-size", metavar="N", type=int, default=16, help="tokens a block (default: 16)")
    demo.add_argument("--max-tokens", metavar="N", type=int, default=16, help="tokens to generate (default: 16)")
    demo.add_argument(
        "--kv-cache-bytes", metavar="SIZE", default="1GiB", help="paged cache of the engine (default: 1GiB)"
    )
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
