"""Everything public is documented: docstrings, arguments, what is raised; and the examples in docstrings run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jlora
import jlora.models
import jlora.serving
import jlora.training


def modules():
    """Every module of the package; those with a leading underscore too, since others read them."""
    found = [jlora]
    for info in pkgutil.walk_packages(jlora.__path__, "jlora."):
        found.append(importlib.import_module(info.name))
    return found


def own(module):
    """The public functions and classes that a module defines."""
    for name, value in vars(module).items():
        defined = getattr(value, "__module__", None) == module.__name__
        if defined and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield f"{module.__name__}.{name}", value


def public():
    """What users call, by name: all of `jlora`, its bridges, `jlora.models`, `jlora.serving` and `jlora.training`."""
    names = {f"jlora.{n}": v for n, v in vars(jlora).items() if not n.startswith("_") and not inspect.ismodule(v)}
    names |= {f"jlora.models.{n}": getattr(jlora.models, n) for n in jlora.models.__all__}
    names |= {f"jlora.serving.{n}": getattr(jlora.serving, n) for n in jlora.serving.__all__}
    names |= {f"jlora.training.{n}": v for n, v in vars(jlora.training).items() if not n.startswith("_")}
    names |= dict(own(jlora.nnx)) | dict(own(jlora.linen))
    return {name: v for name, v in names.items() if str(getattr(v, "__module__", "")).startswith("jlora")}


def test_what_stands_above_the_face_is_imported_where_it_is_asked_for():
    code = "import sys, jlora; before = [name for name in sys.modules if name.startswith('jlora.training')]"
    code += "; assert not before; assert jlora.finetune is jlora.training.finetune; assert jlora.serving.Engine"
    subprocess.run([sys.executable, "-c", code], check=True)


def functions():
    """The functions among what is public, and the public methods of its classes."""
    for name, value in public().items():
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            members = inspect.getmembers(value, inspect.isfunction)
            yield from (
                (f"{name}.{n}", f) for n, f in members if not n.startswith("_") and f.__module__ == value.__module__
            )


def described(function):
    """The docstring, and that of the protocol of methods, updates or codes where the function belongs to it."""
    protocols = [
        getattr(base, function.__name__, None) for base in (jlora.Method, jlora.Lifelong, jlora.Update, jlora.Code)
    ]
    return "\n".join([inspect.getdoc(each) or "" for each in (function, *protocols) if callable(each)])


def arguments_not_named(function):
    """Arguments that the docstring never names: of optional ones all, of required ones where there are more than three."""
    arguments = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    fixed = [p for p in arguments if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    words = set(re.findall(r"\w+", described(function)))
    wanted = [p for p in fixed if p.default is not p.empty or len(fixed) > 3]
    return [p.name for p in wanted if p.name not in words]


def raises_not_listed(function):
    """Exceptions that the body raises and the docstring does not list."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    raised = {call.id for call in calls if isinstance(call, ast.Name)}
    listed = described(function).partition("Raises:")[2]
    return sorted(name for name in raised - {"NotImplementedError"} if name not in listed)


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_every_module_and_every_public_name_in_it_has_a_docstring(module):
    assert (module.__doc__ or "").strip()
    bare = [name for name, value in own(module) if not (value.__doc__ or "").strip()]
    for name, value in own(module):
        if inspect.isclass(value):
            bare += [f"{name}.{n}" for n, member in own_members(value) if not (inspect.getdoc(member) or "").strip()]
    assert bare == []


def own_members(cls):
    """The public functions and properties that a class's own module defines."""
    for name, member in inspect.getmembers(cls, lambda m: inspect.isfunction(m) or isinstance(m, property)):
        function = member.fget if isinstance(member, property) else member
        if not name.startswith("_") and function.__module__ == cls.__module__:
            yield name, member


class Base:
    """Has a property with a docstring."""

    @property
    def size(self):
        """How large."""


class Derived(Base):
    """Overrides it, and has a function that is its own."""

    @property
    def size(self): ...

    def shape(self): ...


def test_an_override_has_the_docstring_of_what_it_overrides_and_other_members_need_their_own():
    found = {name: inspect.getdoc(member) for name, member in own_members(Derived)}
    assert found == {"size": "How large.", "shape": None}


@pytest.mark.parametrize(
    ("name", "function"), list(functions()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_public_functions_name_their_arguments_and_list_what_they_raise(name, function):
    assert arguments_not_named(function) == []
    assert raises_not_listed(function) == []


def test_an_undocumented_argument_and_exception_are_found():
    def copy(source, depth=1):
        """Copies source."""
        raise ValueError("no")

    assert arguments_not_named(copy) == ["depth"]
    assert raises_not_listed(copy) == ["ValueError"]


@pytest.mark.parametrize("cls", [v for v in public().values() if isinstance(v, type) and issubclass(v, jlora.Method)])
def test_methods_document_every_hyperparameter(cls):
    names = [field.name for field in dataclasses.fields(cls)]
    assert [name for name in names if f"{name}:" not in inspect.getdoc(cls)] == []


@pytest.mark.parametrize(("module", "name"), [("gated", "Gated"), ("around", "Around"), ("method", "View")])
def test_modules_that_the_page_on_methods_named_lead_to_where_they_are_now(module, name):
    with pytest.warns(DeprecationWarning, match=f"jlora.{module} has moved: import {name} from jlora$"):
        found = getattr(importlib.import_module(f"jlora.{module}"), name)
    assert found is getattr(jlora, name) and getattr(jlora, module) is importlib.import_module(f"jlora.{module}")
    assert module not in dir(jlora)


def test_a_name_without_a_public_one_leads_to_its_module_and_no_other_name_is_made_up():
    with pytest.warns(DeprecationWarning, match=r"import check_rank from jlora.core.protocol.hyperparameters$"):
        assert callable(jlora.hyperparameters.check_rank)
    with pytest.raises(AttributeError, match="has no attribute 'gates'"):
        _ = jlora.gates


class Attention(nn.Module):
    """Stands for the reader's model in the examples."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16, name="embed")(tokens)
        block = nn.Dense(16, name="q_proj")(x) * nn.Dense(16, name="v_proj")(x)
        return nn.Dense(11, name="head")(block)


class Model(nn.Module):
    """One layer, so that the paths are as deep as in a real model."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(16, name="out")(Attention(name="layer")(tokens))


class Network(nnx.Module):
    """The same for NNX."""

    def __init__(self, rngs):
        self.up, self.head = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.up(x)))


def examples():
    """(name, examples) of every docstring of the package that has any."""
    parser = doctest.DocTestFinder(exclude_empty=True)
    tests = {test.name: test for module in modules() for test in parser.find(module, module.__name__) if test.examples}
    return [pytest.param(test.examples, id=name) for name, test in sorted(tests.items())]


@pytest.fixture(scope="module")
def stand_ins():
    tokens, model = jnp.zeros((2, 3), jnp.int32), Model()
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    sites = jlora.sites(model.apply, {"params": params}, tokens)
    adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=2)})
    names = {"tokens": tokens, "model": model, "params": params, "sites": sites, "adapted": adapted}
    names |= {"nnx": nnx, "network": Network(nnx.Rngs(0)), "x": jnp.ones((2, 4))}
    return {**names, "jlora": jlora, "jax": jax, "jnp": jnp, "optax": optax, "key": jax.random.key(0)}


@pytest.mark.parametrize("found", examples())
def test_the_examples_in_docstrings_run_and_show_what_they_print(found, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any("jlora.load(" in example.source for example in found):
        jlora.save("run/adapters", stand_ins["adapted"])
    assert wrong_outputs(found, dict(stand_ins)) == []


def test_an_example_that_shows_a_wrong_result_is_found():
    found = doctest.DocTestParser().get_examples(">>> x = 1\n>>> x + 1\n3\n")
    assert wrong_outputs(found, {}) == ["x + 1\n shows '3\\n', but gives 2"]


def wrong_outputs(found, space):
    """Runs examples in order; what is wrong with those that show a result."""
    wrong = []
    for example in found:
        value = run(example.source, space)
        if example.want and not doctest.OutputChecker().check_output(example.want, f"{value!r}\n", doctest.ELLIPSIS):
            wrong.append(f"{example.source} shows {example.want!r}, but gives {value!r}")
    return wrong


def run(source, space):
    """The value of an expression, or None after a statement."""
    try:
        code = compile(source, "<example>", "eval")
    except SyntaxError:
        code = compile(source, "<example>", "exec")
    return eval(code, space)
