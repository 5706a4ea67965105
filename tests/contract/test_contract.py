"""Every case of every method in `jlora/methods` against every check of `checks.py`. Both are discovered."""

import types
from dataclasses import dataclass

import pytest

import jlora.methods
from contract import checks, discovery
from jlora.core.products.acting import Acting
from jlora.core.products.update import Update

CHECKS = discovery.checks(checks)
# What another release of JAX could change for one method alone: its operations in a training step, and its files; and what
# it could change for all methods of a form of update at once.
RELEASES, RELEASES_BY_FORM = {"check_learn", "check_io"}, {"check_lift", "check_mesh"}
FIRST_OF_FORM = {case.form: case for case in reversed(discovery.cases()) if case == type(case).CASES[0]}


# What sees a method's form of update alone, and what sees its fields too. A later case of a form, or of a form and fields,
# that were tried is tried on single leaves and a stack, where its formula and its start are seen; so is a later method of a
# form, where neither other leaves nor data have a say in its start.
BY_FORM = {"check_lift", "check_trace_once"}
BY_FIELDS = {"check_mesh", "check_vmap", "check_labels"}


def adds(case, check):
    """Whether this case can fail a check that those before it pass. LoRA's starts differ by the use of a leaf."""
    first = type(case).CASES[0]
    if isinstance(case, jlora.LoRA) or issubclass(case.form or Update, Acting):
        return True
    if case == first:
        alone = not (case.shared_fields or case.needs)
        return not (check == "check_lift" and alone and case.form and case != FIRST_OF_FORM[case.form])
    if check in BY_FORM:
        return case.form is not first.form
    return check not in BY_FIELDS or (case.form, case.axes) != (first.form, first.axes)


def marks(case, check):
    """Plain `pytest` tries the first case of a method: the others cost as much each. CI tries LoRA whole on both releases."""
    if case != type(case).CASES[0]:
        return (pytest.mark.long, pytest.mark.once)
    stands_for_its_form = case == FIRST_OF_FORM[case.form]
    tried = check in RELEASES or (check in RELEASES_BY_FORM and stands_for_its_form) or type(case) is jlora.LoRA
    return () if tried else pytest.mark.once


EACH = [
    pytest.param(case, check, id=f"{case}-{check}", marks=marks(case, check))
    for case in discovery.cases()
    for check in CHECKS
    if adds(case, check)
]


@pytest.mark.parametrize("module", discovery.modules(), ids=lambda module: module.__name__)
def test_every_method_module_has_cases_and_exports_what_is_public(module):
    assert not discovery.problems_of(module, jlora.methods)


@pytest.mark.parametrize(("method", "check"), EACH)
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
