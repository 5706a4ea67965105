"""Finds every method and every check, so that nobody keeps a list."""

import importlib
import inspect
import pkgutil

import jlora.methods
from jlora.core.protocol.method import Method


def modules():
    """Every file and folder of `jlora.methods`, the contributors' skeleton included."""
    names = [info.name for info in pkgutil.iter_modules(jlora.methods.__path__)]
    return [importlib.import_module(f"jlora.methods.{name}") for name in names]


def methods_of(module):
    """The Method subclasses that a module defines, or the files of a folder."""
    files = [module, *(importlib.import_module(f"{module.__name__}.{info.name}") for info in _inside(module))]
    classes = [(file, cls) for file in files for _, cls in inspect.getmembers(file, inspect.isclass)]
    return [cls for file, cls in classes if issubclass(cls, Method) and cls.__module__ == file.__name__]


def _inside(module):
    return pkgutil.iter_modules(getattr(module, "__path__", ()))


def is_public(module):
    """Whether a module's methods are for users; a leading underscore says no."""
    return not module.__name__.rpartition(".")[2].startswith("_")


def problems_of(module, exported):
    """What is wrong with a method module as a whole, in sentences."""
    found = [] if methods_of(module) else [f"{module.__name__} defines no Method"]
    for cls in methods_of(module):
        if not cls.CASES or not all(type(case) is cls for case in cls.CASES):
            found.append(f"{cls.__name__} needs CASES of its own")
        if (getattr(exported, cls.__name__, None) is cls) != is_public(module):
            found.append(f"{cls.__name__} must {'' if is_public(module) else 'not '}be exported from jlora.methods")
    return found


def cases():
    """Every case of every method."""
    return [case for module in modules() for cls in methods_of(module) for case in cls.CASES]


def checks(module):
    """The functions `check_*` of a module by name."""
    return {name: f for name, f in inspect.getmembers(module, inspect.isfunction) if name.startswith("check_")}
