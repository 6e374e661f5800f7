"""The layers of docs/architecture.md, read from every import statement, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.root import REPOSITORY

# From the bottom up. A module imports from its own layer and from those below it, and the longest name that fits counts.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("guard",),
    (
        *("daemon.config", "daemon.errors", "daemon.evaluation", "daemon.job", "daemon.limits", "daemon.lineage"),
        *("daemon.curves", "daemon.in_hand", "daemon.logins", "daemon.notices", "daemon.processes", "daemon.recipe"),
        *(
            "daemon.run_dir",
            "daemon.schedule",
            "daemon.sd_notify",
            "daemon.setting_names",
            "daemon.text",
            "daemon.wakeup",
        ),
    ),
    (
        *("daemon.dataset", "daemon.executors", "daemon.fingerprint", "daemon.gpu", "daemon.holds", "daemon.memory"),
        *("daemon.held_versions", "daemon.second_run", "daemon.version_pruning"),
        *("daemon.observability", "daemon.store", "daemon.root_identity", "daemon.versions"),
        *("daemon.base_identity", "daemon.left_alone"),
    ),
    (
        "daemon.backup",
        "daemon.control",
        "daemon.inbox",
        "daemon.notice_process",
        "daemon.notice_sender",
        "daemon.notifications",
        "daemon.recovery",
        "daemon.retry",
        "daemon.run_window",
        "daemon.scheduler",
        "daemon.status_writer",
        "daemon.verification",
    ),
    ("daemon.containment",),
    ("daemon.service",),
    ("daemon.__main__", "daemon.cli", "daemon.web"),
)
# The trainer is another program: it shares values and files with the daemon, and no module of the daemon imports it.
TRAINER_USES = {
    *(
        "daemon.base_identity",
        "daemon.dataset",
        "daemon.errors",
        "daemon.evaluation",
        "daemon.fingerprint",
        "daemon.job",
        "daemon.limits",
        "daemon.lineage",
        "daemon.processes",
        "daemon.recipe",
    ),
    *("daemon.memory", "daemon.run_dir", "daemon.text", "daemon.trainer", "daemon.versions", "guard"),
}
ONE_USER = {
    "sqlite3": "daemon.store",
    "apprise": "daemon.notice_process",
    "watchdog": "daemon.inbox.watcher",
    "prometheus_client": "daemon.observability.metrics",
}
TRAINING_LIBRARIES = {"accelerate", "datasets", "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers"}


def read_modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for path in sorted([*(REPOSITORY / "daemon").rglob("*.py"), *(REPOSITORY / "guard").rglob("*.py")]):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = read_modules()


def imported_names(module: str) -> Iterator[str]:
    """What a module imports: absolute dotted names, the imported name included."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of the product that a module imports."""
    found = set()
    for imported in imported_names(module):
        name = imported
        while name and name not in MODULES:  # a function or class: the module that has it
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {module, ""}


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_of(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        if any(is_in(module, package) for package in layer):
            return number
    raise AssertionError(f"{module} has no layer: name one in LAYERS, and in docs/architecture.md")


def test_every_package_of_a_layer_exists() -> None:
    named = {package for layer in LAYERS for package in layer} | TRAINER_USES
    assert {package for package in named if package not in MODULES} <= {"daemon.web"}  # whose place is kept


DAEMON = [module for module in MODULES if module != "daemon" and not is_in(module, "daemon.trainer")]


@pytest.mark.parametrize("module", DAEMON)
def test_a_module_imports_nothing_from_a_layer_above_its_own(module: str) -> None:
    own = layer_of(module)
    above = {name for name in own_imports(module) if name != "daemon" and not is_in(name, "daemon.trainer")}
    assert {name for name in above if layer_of(name) > own} == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        list(TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_the_daemon_imports_nothing_of_the_trainer_and_no_training_library() -> None:
    """Not even inside a function: they share files and values alone."""
    for module in DAEMON:
        if is_in(module, "guard"):
            continue  # its callback is made for scripts that train
        names = set(imported_names(module))
        assert {name for name in names if is_in(name, "daemon.trainer")} == set(), module
        assert {name.partition(".")[0] for name in names} & TRAINING_LIBRARIES == set(), module


def test_the_trainer_imports_nothing_of_the_daemon_s_effects() -> None:
    for module in MODULES:
        if is_in(module, "daemon.trainer"):
            foreign = {
                name for name in own_imports(module) if not any(is_in(name, package) for package in TRAINER_USES)
            }
            assert foreign == set(), module


@pytest.mark.parametrize("library", sorted(ONE_USER))
def test_a_library_with_effects_is_used_in_one_module_alone(library: str) -> None:
    users = {module for module in MODULES if library in {name.partition(".")[0] for name in imported_names(module)}}
    assert users == {ONE_USER[library]}


def test_who_takes_a_models_lock_takes_no_gpus_lock_after_it() -> None:
    """State, GPU, model: in one order, so that two daemons never wait for each other. The daemon's own is the first."""
    takers = {
        module
        for module in MODULES
        if is_in(module, "daemon") and "ModelLock(" in MODULES[module].read_text(encoding="utf-8")
    } - {"daemon.service"}
    assert takers
    for module in takers:
        assert not {name for name in own_imports(module) if is_in(name, "daemon.gpu")}, module


def test_an_import_that_goes_up_would_be_seen() -> None:
    """What the tests above rely on: the layers, read from real statements."""
    assert layer_of("daemon.cli.jobs") > layer_of("daemon.service") > layer_of("daemon.store") > layer_of("guard.seal")
    assert "daemon.scheduler" in own_imports("daemon.service")
    assert "guard.atomic" in own_imports("guard.clear")
    assert "daemon.inbox.layout" in own_imports("daemon.cli.render")
