"""The rooms of smooseg_fast: which folder may import which, and that no import leads back to where it began."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import smooseg_fast

HOME = Path(smooseg_fast.__file__).parent
# from the top floor down: a room may import the rooms below it, and none on its own floor
FLOORS = (
    ("commands",),
    ("learn", "export"),
    ("show",),
    ("measure",),
    ("features", "segment"),
    ("datasets", "backbones"),
    ("config",),
    ("system",),
    ("errors",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {path.relative_to(HOME).with_suffix("").as_posix(): path for path in HOME.rglob("*.py")}


def room_of(module: str) -> str:
    folder, slash, _ = module.partition("/")
    return folder if slash or folder in FLOOR else "commands"


def imports_of(module: str) -> set[str]:
    """The modules of smooseg_fast that `module` imports, also inside functions and for types alone."""
    package = ("smooseg_fast/" + module).split("/")[:-1]
    targets = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("smooseg_fast.") for alias in node.names), (
                f"{module}: import relatively"
            )
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[1 : len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            for place in ("/".join([*base, alias.name]), "/".join(base), "/".join([*base, "__init__"])):
                if place in MODULES:
                    targets.add(place)
                    break
    return targets - {module}


ARROWS = {module: imports_of(module) for module in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_lead_down(module):
    room = room_of(module)
    for target in ARROWS[module]:
        below = room_of(target)
        if target == "__init__":  # the package's own name and version
            continue
        assert below == room or FLOOR[below] > FLOOR[room], (
            f"{module} ({room}) imports {target} ({below}), which is not below it"
        )


def test_no_import_leads_back_to_where_it_began():
    graph = {module: targets for module, targets in ARROWS.items() if module != "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_is_too_long_to_be_one_idea():
    too_long = {
        module: n for module, path in MODULES.items() if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not too_long


@pytest.mark.parametrize("package", ["smooseg_fast", "smooseg_kernels"])
def test_calls_have_at_most_six_arguments_by_position(package):
    home = Path(__import__(package).__file__).parent
    many = [
        f"{path.relative_to(home)}:{call.lineno} {ast.unparse(call.func)}"
        for path in home.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        # what PyTorch saves for a backward has no names
        if isinstance(call, ast.Call)
        and len(call.args) > 6
        and not ast.unparse(call.func).endswith("save_for_backward")
    ]
    assert not many
