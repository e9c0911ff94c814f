"""The direction of imports, read from the code itself: who may use whom (docs/architecture.md)."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = {"nanolm": "nanolm", "nanolm.data": "data", "nanolm.kernels": "kernels"}

# Rooms from the ground up. A module imports its own room and rooms on lower floors: nothing above
# it, and nothing beside it.
FLOORS = (
    {"errors", "processes", "terminal"},
    {"registry", "files", "tables"},
    {"config", "ops"},
    {"data", "model", "distributed", "kernels"},
    {"objectives", "checkpoint", "cli"},
    {"learner"},
    {"training"},
    {"build", "peft"},
    {"run", "saved", "hub"},
    {"pretrain", "inference", "rules"},
    {"finetune"},
    {"tools", "built_in"},
    {"commands"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


MODULES = dict(modules())


@functools.cache
def nodes(path):
    """The file's import statements, those for type checkers alone among them, and whether each
    stands at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    return [
        (node, id(node) in top)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def imports(path, *, top_level_only=False):
    """Modules (and, of others' packages, names) that a file imports."""
    for node, at_top in nodes(path):
        if top_level_only and not at_top:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        assert node.level == 0, f"{path} has a relative import"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield name if name in MODULES else node.module


def inside(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def room(name):
    return name.split(".")[1] if "." in name else None


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in FLOOR_OF])
def test_a_module_imports_its_own_room_and_lower_floors_only(name):
    for used in imports(MODULES[name]):
        if inside(used, "nanolm") and room(used) not in (None, room(name)):
            assert room(used) in FLOOR_OF, f"{name} imports {used}, whose floor nobody has named"
            lower = FLOOR_OF[room(used)] < FLOOR_OF[room(name)]
            assert lower, f"{name} imports {used}, which is not on a lower floor"


def test_every_room_has_a_floor():
    rooms = {room(name) for name in MODULES} - {None, "__main__"}
    assert rooms == set(FLOOR_OF)


def test_the_picture_of_the_house_shows_every_room_and_no_arrow_that_runs_up():
    from tests import house

    drawn = house.draw(house.arrows())
    kept = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    for text in (drawn, kept):
        assert 'class="up"' not in text
        assert all(f">{name}</text>" in text for name in FLOOR_OF)
        # 16 px at the width that a page gives it, and words for who does not see it.
        assert 'width="720" viewBox="0 0 720 ' in text and "font: 16px" in text
        assert all(part in text for part in ('role="img"', "<title id=", "<desc id="))
    # How many imports an arrow stands for, and so how dark it is, changes with any import.
    counts = re.compile(r' stroke-opacity="[\d.]+"|: \d+(?=</title>)')
    same = counts.sub("", kept) == counts.sub("", drawn)
    assert same, "docs/house.svg is of another tree: `make house` draws this one's"
    assert 'class="up"' in house.draw({("errors", "commands"): 1})


def circles(graph):
    """Sets of modules that import each other, directly or by others (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            ring = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.append(ring)

    for node in graph:
        if node not in index:
            visit(node)
    return [ring for ring in found if len(ring) > 1]


def test_nothing_imports_in_a_circle():
    graph = {
        name: {used for used in imports(path) if used in MODULES} - {name}
        for name, path in MODULES.items()
    }
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_data_knows_neither_torch_nor_the_model():
    allowed = ("nanolm.data", "nanolm.errors", "nanolm.registry", "nanolm.files", "nanolm.config")
    allowed += ("nanolm.tables", "nanolm.terminal")
    for name, path in MODULES.items():
        if inside(name, "nanolm.data"):
            for used in imports(path):
                assert not inside(used, "torch"), f"{name} imports torch"
                if inside(used, "nanolm"):
                    assert any(inside(used, prefix) for prefix in allowed), f"{name}: {used}"


def test_preparing_data_imports_no_torch():
    code = "import nanolm.data.prepare.pipeline, nanolm.data.stream, sys\n"
    words = [sys.executable, "-c", f"{code}print('torch' in sys.modules)"]
    assert subprocess.check_output(words, cwd=ROOT, text=True).strip() == "False"


def test_kernels_know_only_the_ops():
    allowed = ("nanolm.kernels", "nanolm.ops", "nanolm.errors", "nanolm.registry")
    for name, path in MODULES.items():
        if inside(name, "nanolm.kernels"):
            for used in imports(path):
                if inside(used, "nanolm") and used != "nanolm":
                    assert any(inside(used, prefix) for prefix in allowed), f"{name}: {used}"


def test_ops_and_model_import_no_kernel_at_import_time():
    for name, path in MODULES.items():
        if room(name) in ("ops", "model"):
            for used in imports(path, top_level_only=True):
                assert not inside(used, "nanolm.kernels") and not inside(used, "triton"), name


def test_nobody_imports_commands_or_what_is_built_in_by_name():
    for name, path in MODULES.items():
        for used in imports(path):
            assert room(used) != "built_in", f"{name} imports {used}; registries open it"
            if room(used) == "commands":
                assert room(name) == "commands", f"{name} imports {used}"


def test_training_knows_no_add_on_and_the_trainer_no_model():
    for name, path in MODULES.items():
        if room(name) == "training":
            for used in imports(path):
                add_on = inside(used, "nanolm") and room(used) in ("peft", "rules", "finetune")
                assert not add_on, f"{name} imports {used}"
    for used in imports(MODULES["nanolm.training.trainer"]):
        assert not inside(used, "nanolm.model") and not inside(used, "nanolm.objectives")


@pytest.mark.parametrize("name", ["conftest", "tests", "nanolm", "docs"])
def test_nothing_else_of_the_repository_is_in_the_package(name):
    words = [sys.executable, "-c", f"import nanolm.{name}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr


def test_nothing_is_pickled():
    for name, path in MODULES.items():
        reads_foreign = name == "nanolm.hub.folder"  # pytorch_model.bin, when the user allows it
        for used in imports(path):
            allowed = ("pickle",) if reads_foreign else ()  # for the name of its exception
            forbidden = {"pickle", "dill", "joblib", "shelve"}.difference(allowed)
            assert used.split(".")[0] not in forbidden, name
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load") == reads_foreign and "torch.save" not in text, name
        assert text.count("pickle.") == text.count("pickle.UnpicklingError") or not reads_foreign
        if reads_foreign:
            call = 'torch.load(path, map_location="cpu", weights_only=True)'
            assert text.count(call) == 1, name


def test_a_command_stands_in_the_file_of_its_name():
    from nanolm.cli import COMMANDS

    for name, (module, _) in COMMANDS.items():
        words = module.removeprefix("nanolm.commands.").rstrip("_").split(".")
        assert words == name.split(), f"nanolm {name} stands in {module}"
