"""The direction of imports, read from the code itself: who may use whom (DESIGN of the house)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = {"nanolm": "nanolm", "nanolm.data": "data", "nanolm.kernels": "kernels"}

# Layers from the ground up: a module may import those of its own layer and of the layers below.
LAYERS = [
    {"nanolm.errors", "nanolm.registry", "nanolm.strict_yaml", "nanolm.typed", "nanolm.typing"},
    {
        "nanolm.model_config",
        "nanolm.config",
        "nanolm.task_config",
        "nanolm.choices",
        "nanolm.arguments",
    },
    {"nanolm.masks", "nanolm.bias", "nanolm.cache"},
    {
        "nanolm.ops",
        "nanolm.ops_reference",
        "nanolm.ops_torch",
        "nanolm.ops_cross_entropy",
        "nanolm.ops_wide",
        "nanolm.ops_by_length",
        "nanolm.ops_flex",
        "nanolm.ops_triton",
        "nanolm.rederive",
    },
    {"nanolm.positions"},
    {"nanolm.layers"},
    {"nanolm.blocks"},
    {"nanolm.model", "nanolm.flops"},
    {"nanolm.heads", "nanolm.task_heads", "nanolm.gather"},
    {"nanolm.objectives", "nanolm.task_metrics"},
    {"nanolm.learner"},
]


def modules():
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            yield name, path


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name):
    found = [i for i, layer in enumerate(LAYERS) if any(inside(name, m) for m in layer)]
    return found[0] if found else None


MODULES = dict(modules())


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "nanolm.data")])
def test_data_knows_neither_torch_nor_the_model(name):
    allowed = ("nanolm.data", "nanolm.errors", "nanolm.registry", "nanolm.config")
    for used in imports(MODULES[name]):
        assert not inside(used, "torch"), f"{name} imports torch"
        if inside(used, "nanolm") and used not in ("nanolm", "nanolm.data"):
            assert any(inside(used, prefix) for prefix in allowed), f"{name} imports {used}"


@pytest.mark.parametrize("name", [name for name in MODULES if layer_of(name) is not None])
def test_the_model_imports_downwards_only(name):
    for used in imports(MODULES[name], top_level_only=True):
        if inside(used, "nanolm.data") or used == "nanolm" or not inside(used, "nanolm"):
            reads_data = ("nanolm.objectives", "nanolm.task_metrics")
            assert name.startswith(reads_data) or not inside(used, "nanolm.data")
            continue
        if used not in MODULES and used.rpartition(".")[0] in MODULES:
            used = used.rpartition(".")[0]
        below = layer_of(used)
        assert below is not None, f"{name} imports {used}, which stands above the model"
        assert below <= layer_of(name), f"{name} imports {used}, which stands above it"


def test_ops_imports_no_kernel_at_import_time():
    for name in ("nanolm.ops", "nanolm.ops_reference", "nanolm.ops_torch", "nanolm.layers"):
        for used in imports(MODULES[name], top_level_only=True):
            assert not inside(used, "nanolm.kernels") and not inside(used, "triton")


def test_kernels_know_only_the_contract():
    allowed = (
        "nanolm.kernels",
        "nanolm.ops",
        "nanolm.ops_reference",
        "nanolm.masks",
        "nanolm.bias",
    )
    allowed = (*allowed, "nanolm.errors", "nanolm.registry")
    for name, path in MODULES.items():
        if inside(name, "nanolm.kernels"):
            for used in imports(path, top_level_only=True):
                if inside(used, "nanolm") and used != "nanolm":
                    assert any(inside(used, prefix) for prefix in allowed), f"{name}: {used}"


def test_the_trainer_knows_no_model():
    for used in imports(MODULES["nanolm.trainer"]):
        for model in ("layers", "model", "heads", "objectives", "masks", "ops", "positions"):
            assert not inside(used, f"nanolm.{model}")


def test_nothing_is_pickled():
    for name, path in MODULES.items():
        for used in imports(path):
            assert used.split(".")[0] not in ("pickle", "dill", "joblib", "shelve"), name
        text = path.read_text(encoding="utf-8")
        assert "torch.load" not in text and "torch.save" not in text, name
