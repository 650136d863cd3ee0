"""Reads the command line and runs a command. Imports neither torch nor a connector before it must."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from kvconnect.errors import ConfigError, KVConnectError

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
        if options.command == "new":
            from kvconnect.cli.new import write_skeleton

            write_skeleton(options.name, options.folder)
            return 0
        if options.command == "conformance":
            if options.self_test:
                if options.target is not None:
                    raise ConfigError("--self-test runs the kits on their own mutants, and takes no target")
                from kvconnect.cli.self_test import run_self_test

                return run_self_test(options.json)
            if options.target is None:
                raise ConfigError("name what to test: a registered name, a URL or module:Class; or give --self-test")
            from kvconnect.cli.conformance import ConformanceOptions, run_conformance

            return run_conformance(
                ConformanceOptions(
                    target=options.target,
                    options=options.options,
                    kit=options.kit,
                    json_file=options.json,
                    seed=options.seed,
                    seeds=options.seeds,
                    quick=options.quick,
                    no_env_skips=options.no_env_skips,
                )
            )
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
        extras = {"rich": "cli", "transformers": "engine", "pytest": "test", "hypothesis": "test"}
        if error.name not in extras:
            raise
        extra = extras[error.name]
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
    new = commands.add_parser(
        "new",
        help="write the skeleton of a distribution with a store of your own",
        description="Writes a folder with a pyproject.toml, a store that passes the conformance kits, and its tests.",
    )
    new.add_argument("name", metavar="NAME", help="what users will write: NAME://...")
    new.add_argument("--folder", metavar="DIR", help="where (default: kvconnect-NAME)")
    kits = commands.add_parser(
        "conformance",
        help="prove a connector or a store right",
        description="Runs the conformance kits. Exit status 0 if every promise that could be shown was kept, 1 if one "
        "was broken, 2 if the kits could not run.",
    )
    kits.add_argument("target", metavar="TARGET", nargs="?", help="a registered name, a URL, or module:Class")
    kits.add_argument(
        "--self-test",
        action="store_true",
        help="instead of a target: do the kits installed here catch their mutants, and pass what is right?",
    )
    kits.add_argument("--options", metavar="JSON", default="{}", help="its options; {tmp} is a fresh folder")
    kits.add_argument("--kit", choices=("store", "leader", "worker", "connector", "all"), default="all")
    kits.add_argument("--json", metavar="FILE", help="write the report there")
    kits.add_argument("--seed", metavar="N", type=int, default=0, help="repeats a run (default: 0)")
    kits.add_argument("--seeds", metavar="N", type=int, default=1, help="random schedules under N seeds (default: 1)")
    kits.add_argument("--quick", action="store_true", help="the shortest form of each test")
    kits.add_argument(
        "--no-env-skips", action="store_true", help="what this machine cannot run counts as broken, not as skipped"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
