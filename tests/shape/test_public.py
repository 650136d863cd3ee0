"""What is public: sorted, complete, documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import kvconnect
from kvconnect import Leader, Worker, errors
from kvconnect.hooks import hook_names
from kvconnect.protocol import LeaderHooks, RegistrationHooks, WorkerHooks

ROOT = Path(__file__).parents[2]
SPECS = (RegistrationHooks, LeaderHooks, WorkerHooks)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "kvconnect").rglob("*.py")
)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "kvconnect.cli"])
def test_module_lists_what_is_public_and_has_it(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, "a module opens with its contract"
    exported = module.__all__
    assert len(set(exported)) == len(exported)
    for each in exported:
        assert getattr(module, each) is not None


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_sorted(name: str) -> None:
    exported = getattr(importlib.import_module(name), "__all__", [])
    order = {False: 2, True: 0}  # constants, then classes, then the rest: as ruff sorts them

    def key(each: str) -> tuple[int, str]:
        return (order[each.isupper()] if each.isupper() or not each[0].isupper() else 1, each)

    assert exported == sorted(exported, key=key)


def test_facade_offers_what_readme_uses() -> None:
    for name in kvconnect.__all__:
        assert getattr(kvconnect, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvconnect.nonsense


def test_error_tree_in_the_docstring_is_the_real_one() -> None:
    documented = set(re.findall(r"[A-Z]\w+", (errors.__doc__ or "").split("\n\n")[1])) & set(errors.__all__)
    assert documented == set(errors.__all__)
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.KVConnectError)
        twin = re.search(rf"{name} \((\w+)\)", errors.__doc__ or "")
        if twin:
            assert issubclass(kind, getattr(__import__("builtins"), twin[1]))


@pytest.mark.parametrize(
    ("spec", "name"), [(spec, name) for spec in SPECS for name in hook_names(spec)], ids=lambda value: str(value)
)
def test_every_hook_says_who_when_whether_it_blocks_and_what_failure_means(spec: type, name: str) -> None:
    document = inspect.getdoc(getattr(spec, name)) or ""
    ends = [
        line.split(":")[0] for line in document.splitlines() if re.match(r"(Runs|When|May block|On failure):", line)
    ]
    assert ends == ["Runs", "When", "May block", "On failure"]


@pytest.mark.parametrize(("base", "spec"), [(Leader, LeaderHooks), (Worker, WorkerHooks)])
def test_bases_have_every_hook_with_the_same_arguments_and_no_more(base: Any, spec: type) -> None:
    public = {name for name in vars(base) if not name.startswith("_")}
    assert public == set(hook_names(spec))
    for name in public:
        assert list(inspect.signature(getattr(base, name)).parameters) == list(
            inspect.signature(getattr(spec, name)).parameters
        )


def test_no_pickle_and_no_execution_of_stored_bytes() -> None:
    """Promise 6: not a single import of what could run bytes that came from outside."""
    forbidden = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for path in [*(ROOT / "kvconnect").rglob("*.py"), *(ROOT / "connectors").rglob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        if "testing" in path.relative_to(ROOT).parts:
            continue  # the kits import it to forbid it, and some mutants use it: that is their mistake
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load"), path


@pytest.mark.parametrize(
    "page",
    sorted(p for p in ROOT.rglob("*.md") if not any(part.startswith(".venv") for part in p.relative_to(ROOT).parts)),
    ids=lambda p: p.name,
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_opens_with_what_a_newcomer_needs() -> None:
    head = (ROOT / "README.md").read_text("utf-8").splitlines()[:40]
    text = "\n".join(head)
    places = [text.index(word) for word in ("Try it", "make demo", "make test", "warm", "Use it", "Write your own")]
    assert places == sorted(places)


def test_readme_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of the README are executed, with its cache folder put into a temporary one."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block.replace("/tmp/kv", f"{tmp_path}/kv"), "README.md", "exec"), {"__name__": "readme"})
