"""The house: a room may use itself and the rooms below it, and no files import one another in a circle."""

import ast
import graphlib
import importlib
import inspect
from pathlib import Path

import jlora

PACKAGE = Path(jlora.__file__).parent

#: From the ground up; docs/design.md says what each is for.
ROOMS = (
    "_chunks",
    "_compat",
    "_former",
    "paths",
    "core.products",
    "core.protocol",
    "core.walk",
    "core.tree",
    "core.transforms",
    "stored",
    "mesh",
    "optimize",
    "losses",
    "nnx",
    "linen",
    "methods",
    "prompts",
    "continual",
    "disk",
    "analysis",
    "compose",
    "models",
    "interchange.leaves",
    "interchange.files",
    "interchange.trained",
    "interchange.kinds",
    "interchange",
    "",
    "serving",
    "training.errors",
    "training.files",
    "training.folder",
    "training.settings",
    "training.data",
    "training.hosts",
    "training.model",
    "training.reporting",
    "training.run",
    "training.job",
    "training.sweep",
    "training.commands",
    "training",
)


def modules():
    """Every module by its name below `jlora`, with its file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, names):
    """The modules of jlora that a file imports anywhere, in functions and under `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "jlora":
            module = node.module.removeprefix("jlora").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in names else module
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("jlora").removeprefix(".") for a in node.names if a.name.startswith("jlora")
            )


def room(module):
    """The room that a module is in, or None where it is in none."""
    inside = [name for name in ROOMS if name and (module == name or module.startswith(f"{name}."))]
    return inside[0] if inside else "" if module == "" else None


def edges():
    names = modules()
    return {module: set(imports(path, names)) for module, path in names.items()}


def test_every_file_is_in_a_room():
    lone = [module for module in modules() if room(module) is None and module != "core"]
    assert lone == []


def test_a_room_uses_only_what_lies_below_it():
    wrong = [
        f"{module} uses {used}"
        for module, below in edges().items()
        for used in below
        if room(module) is not None and ROOMS.index(room(used)) > ROOMS.index(room(module))
    ]
    assert sorted(wrong) == []


def test_no_files_import_one_another_in_a_circle():
    try:
        tuple(graphlib.TopologicalSorter(edges()).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_at_most_a_dozen_files_and_folders_are_at_the_top():
    files = [path.name for path in PACKAGE.glob("*.py")]
    assert len(files) <= 12, files


def test_the_job_has_a_room_for_each_of_its_subjects():
    folders = [PACKAGE / "training", *(path for path in (PACKAGE / "training").rglob("*") if path.is_dir())]
    files = {folder.name: len([*folder.glob("*.py")]) for folder in folders}
    assert {name: count for name, count in files.items() if count > 12} == {}


def test_no_room_has_the_name_of_something_public():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not folders & {name for name in jlora.__all__ if not inspect.ismodule(getattr(jlora, name))}


def test_the_check_sees_imports_in_functions_and_for_types(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("if TYPE_CHECKING:\n    from jlora import mesh\ndef f():\n    import jlora.training.job\n")
    assert sorted(imports(file, modules())) == ["mesh", "training.job"]


def test_what_scripts_import_of_the_package_is_there():
    """No suite runs every experiment: a name that has moved is found here, and not by the next who runs one."""
    root = PACKAGE.parent
    scripts = [path for folder in ("experiments", "docs") for path in sorted((root / folder).rglob("*.py"))]
    imports = {
        (path, found.module, each.name)
        for path in scripts
        for found in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(found, ast.ImportFrom) and (found.module or "").partition(".")[0] == PACKAGE.name
        for each in found.names
    }
    assert len({path for path, *_ in imports}) > 20
    missing = [
        f"{path.relative_to(root)}: {module}.{name}" for path, module, name in imports if not there(module, name)
    ]
    assert not missing


def there(module, name):
    """Whether `from module import name` finds something, a name in it or a module below it."""
    try:
        found = importlib.import_module(module)
        return hasattr(found, name) or bool(importlib.import_module(f"{module}.{name}"))
    except ModuleNotFoundError:
        return False
