"""Which room may import which, and what some modules must do without."""

import ast
from pathlib import Path

import grimp
import pytest

import fedrevive_jax

# room or module at the root -> the rooms it imports, all of them above it in this table. Two words
# that everybody speaks are left out: `errors`, which imports nothing, and `config`, which imports
# `errors` alone.
MAY_IMPORT = {
    "errors": "",
    "config": "",
    "presets": "",
    "compute": "",
    "data": "compute",
    "clock": "compute data",
    "models": "compute data",
    "messages": "models",
    "clients": "compute data models messages",
    "dfkd": "compute models messages",
    "methods": "compute models messages dfkd",
    "record": "compute data models dfkd",
    "pages": "record",
    "server": "compute data models messages dfkd methods record",
    "simulation": "compute data clock models messages clients dfkd methods record server",
    "running": "compute data clock models clients dfkd record pages server simulation",
    "live": "compute data clock models messages clients record server running",
    "comparison": "compute data presets record pages server simulation running",
}
COMMON = {"errors", "config"}
# module -> what it never reaches, however far the way.
NEVER = {
    "server.version_store": ["methods", "dfkd", "models", "data", "config", "record"],
    "server.core": ["clients", "clock", "simulation", "running"],
    "server.builder": ["clients", "clock", "simulation", "running", "data.partition"],
    "record.reading": ["simulation", "server", "clock", "clients"],
    "pages.run": ["simulation", "server", "clock", "clients"],
    "running.restore": ["simulation", "server", "clock"],
    "simulation.planning": ["running"],
    "live.coordinator": ["clients", "clock", "simulation", "running", "record.checkpoint"],
    "live.wire": ["data", "models", "server", "config", "compute"],
    "live.flower.records": ["data", "models", "server", "config", "compute"],
    "live.flower.client_app": ["data", "models", "server", "config", "compute"],
    "clients.local_training": ["server", "methods", "dfkd", "clock"],
}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("fedrevive_jax")


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def test_the_table_is_an_order():
    rooms = list(MAY_IMPORT)
    for place, (room, others) in enumerate(MAY_IMPORT.items()):
        assert all(other in rooms[:place] for other in others.split()), room


def arrows(graph):
    """(room, room it imports) of all modules."""
    return {
        (room_of(module), room_of(other))
        for module in graph.modules - {"fedrevive_jax"}
        for other in graph.find_modules_directly_imported_by(module)
        if room_of(module) != room_of(other)
    }


def test_no_arrow_is_missing_in_the_table(graph):
    found = {(one, other) for one, other in arrows(graph) if other not in COMMON}
    allowed = {(one, other) for one, others in MAY_IMPORT.items() for other in others.split()}
    assert not found - allowed


def test_everybody_may_speak_of_errors_and_configurations(graph):
    """Because they know of nobody."""
    assert {(one, other) for one, other in arrows(graph) if one in COMMON} == {("config", "errors")}


def test_every_room_stands_in_the_table(graph):
    assert {room_of(module) for module in graph.modules} == {"", *MAY_IMPORT}


@pytest.mark.parametrize("module", NEVER)
def test_what_a_module_does_without(graph, module):
    reached = graph.find_upstream_modules(f"fedrevive_jax.{module}")
    for never in NEVER[module]:
        parts = {name for name in reached if f"{name}.".startswith(f"fedrevive_jax.{never}.")}
        assert not parts, f"{module} reaches {parts}"


def test_the_public_names_lead_somewhere():
    for name in fedrevive_jax.__all__:
        assert getattr(fedrevive_jax, name) is not None


def test_a_type_checker_sees_the_same_public_names():
    tree = ast.parse(Path(fedrevive_jax.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.name: node.module.removeprefix("fedrevive_jax.")
        for node in imports
        if node.module.startswith("fedrevive_jax.")
        for alias in node.names
    }
    assert seen == fedrevive_jax._WHERE
    assert sorted(seen) == sorted(fedrevive_jax.__all__)
