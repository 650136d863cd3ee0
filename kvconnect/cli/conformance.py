"""``kvconnect conformance``: runs the kits on a target through pytest, and says what was kept and what was broken."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from kvconnect.errors import ConfigError, UnsupportedError

__all__ = ["ConformanceOptions", "run_conformance"]


class ConformanceOptions(NamedTuple):
    """The command line."""

    target: str
    options: str = "{}"
    kit: str = "all"
    json_file: str | None = None
    seed: int = 0
    seeds: int = 1
    quick: bool = False
    no_env_skips: bool = False


def run_conformance(options: ConformanceOptions) -> int:
    """Run the kits; return 0 if no promise was broken, 1 if one was.

    Raises:
        ConfigError: If the target cannot be found, configured or opened: nothing could be run.
    """
    import pytest  # late: other commands need none of it

    from kvconnect.testing.harness import StepEngine
    from kvconnect.testing.report import describe, document, summary_lines
    from kvconnect.testing.target import Target

    started = time.monotonic()
    given = _given(options.options)
    with tempfile.TemporaryDirectory(prefix="kvconnect-conformance-") as name:
        folder = Path(name)
        (folder / "first").mkdir()
        target = Target((options.target, given), folder / "first")
        try:
            StepEngine(target).close()
        except UnsupportedError as error:
            raise ConfigError(f"{options.target!r} does not work under the kit's engine: {error}") from error
        capabilities = {field: getattr(target.capabilities, field) for field in target.capabilities.__struct_fields__}
        can = ", ".join(field for field, value in capabilities.items() if value is True)
        print(f"{target.name} ({can or 'nothing declared'}), kits: {options.kit}, seed {_seeds(options)}", flush=True)
        progress = _Progress()
        (folder / "pytest.ini").write_text("[pytest]\n")
        arguments = ["--pyargs", "kvconnect.testing.installed", "-c", str(folder / "pytest.ini")]
        arguments += ["--rootdir", name, "--basetemp", str(folder / "tests"), "-p", "no:cacheprovider"]
        arguments += ["-p", "no:terminal", "-p", "no:logging", "--kv-connector", options.target]
        arguments += ["--kv-options", options.options, "--kv-kit", options.kit, "--kv-seed", str(options.seed)]
        arguments += ["--kv-seeds", str(options.seeds), "--kv-report", str(folder / "report.json")]
        arguments += ["--kv-quick"] if options.quick else []
        arguments += ["--kv-no-env-skips"] if options.no_env_skips else []
        status = pytest.main(arguments, plugins=[progress])
        if status not in (0, 1) or not (folder / "report.json").is_file():
            raise ConfigError(progress.trouble or f"the kits could not be run (pytest ended with {int(status)})")
        promises = json.loads((folder / "report.json").read_text("utf-8"))["promises"]
    settings = {
        "seed": options.seed,
        "seeds": options.seeds,
        "quick": options.quick,
        "kit": options.kit,
        "capabilities": capabilities,
        **describe(target.kind),
    }
    report = document(target.name, importlib.metadata.version("kvconnect"), settings, promises)
    broken = [each for each in promises if each["outcome"] == "broken"]
    for line in summary_lines(report):
        print(line)
    kept = report["summary"].get("kept", 0)
    print(f"{kept} promises kept, {len(broken)} broken, in {time.monotonic() - started:.0f} s")
    if broken:
        print(f"again: {_again(options, broken)}")
    if options.json_file:
        Path(options.json_file).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 1 if broken else 0


class _Progress:
    """Prints broken promises as they come, instead of pytest's own report."""

    def __init__(self) -> None:
        self.trouble = ""
        self._printed = 0

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Print what the test that has ended broke."""
        from kvconnect_pytest import line_of

        promises = self._results.promises
        for entry in promises[self._printed :]:
            if entry["outcome"] == "broken":
                print(line_of(entry), flush=True)
        self._printed = len(promises)

    def pytest_configure(self, config: Any) -> None:
        """Find who collects the results."""
        self._results = config.pluginmanager.getplugin("kvconnect-results")

    def pytest_collectreport(self, report: Any) -> None:
        """Remember why something could not be collected."""
        if report.failed:
            self.trouble = str(report.longrepr).strip().splitlines()[-1]


def _given(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--options is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"--options must be a JSON object, not {text}")
    return given


def _seeds(options: ConformanceOptions) -> str:
    return str(options.seed) if options.seeds == 1 else f"{options.seed} to {options.seed + options.seeds - 1}"


def _again(options: ConformanceOptions, broken: list[dict[str, Any]]) -> str:
    parts = ["kvconnect conformance", options.target, "--seed", str(broken[0]["seed"])]
    if options.options != "{}":
        parts += ["--options", f"'{options.options}'"]
    return " ".join([*parts, *(["--quick"] if options.quick else [])])
