"""Every case of every method in `jlora/methods` against every check of `checks.py`. Both are discovered."""

import types
from dataclasses import dataclass

import pytest

import jlora.methods
from contract import checks, discovery

CHECKS = discovery.checks(checks)
# The first case of a method is tried by plain `pytest`; the others, which cost as much each, are among the long tests.
CASES = [
    pytest.param(case, id=str(case), marks=() if case == type(case).CASES[0] else pytest.mark.long)
    for case in discovery.cases()
]


@pytest.mark.parametrize("module", discovery.modules(), ids=lambda module: module.__name__)
def test_every_method_module_has_cases_and_exports_what_is_public(module):
    assert not discovery.problems_of(module, jlora.methods)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("method", CASES)
def test_contract(method, check):
    CHECKS[check](method)


def test_a_method_without_cases_or_not_exported_is_a_failure():
    @dataclass(frozen=True)
    class Forgotten(jlora.Method):
        pass

    module = types.ModuleType("jlora.methods.forgotten")
    assert discovery.problems_of(module, jlora.methods) == ["jlora.methods.forgotten defines no Method"]
    Forgotten.__module__ = module.__name__
    module.Forgotten = Forgotten
    assert discovery.problems_of(module, jlora.methods) == [
        "Forgotten needs CASES of its own",
        "Forgotten must be exported from jlora.methods",
    ]
