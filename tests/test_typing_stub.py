"""The stub acre/_core.pyi says what the compiled module has: names, kinds, signatures.

Both sides are read as data: the stub by `ast`, the module by `inspect`, whose
signatures come from the text signatures in the C docstrings. A default that differs
between the two fails here too.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from acre import _core

STUB = Path(_core.__file__).with_name("_core.pyi")
TREE = ast.parse(STUB.read_text(encoding="utf-8"))
EMPTY = inspect.Parameter.empty


def stub_classes() -> dict[str, ast.ClassDef]:
    """The stub's classes that exist at run time: neither private nor protocols."""
    return {
        node.name: node
        for node in TREE.body
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and not any(ast.unparse(base) == "Protocol" for base in node.bases)
    }


def stub_functions(body: list[ast.stmt]) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def is_property(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d) == "property" for d in function.decorator_list)


def stub_parameters(function: ast.FunctionDef) -> list[tuple[str, str, object]]:
    """(name, kind, default) of each parameter, without self and cls."""
    a = function.args
    positional = [
        *[(x.arg, "POSITIONAL_ONLY") for x in a.posonlyargs],
        *[(x.arg, "POSITIONAL_OR_KEYWORD") for x in a.args],
    ]
    defaults = [EMPTY] * (len(positional) - len(a.defaults))
    defaults += [ast.literal_eval(d) for d in a.defaults]
    out = [(n, k, d) for (n, k), d in zip(positional, defaults, strict=True)]
    for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        out.append((x.arg, "KEYWORD_ONLY", EMPTY if d is None else ast.literal_eval(d)))
    return [p for p in out if p[0] not in ("self", "cls")]


def real_parameters(function: object) -> list[tuple[str, str, object]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default) for p in parameters if p.name != "self"]


CLASSES = stub_classes()
TYPES = [name for name in CLASSES if not name.endswith("Error")]


def test_module_names() -> None:
    described = set(CLASSES) | set(stub_functions(TREE.body)) | {"__version__"}
    present = {name for name in vars(_core) if not name.startswith("_")}
    assert described == present | {"__version__"}
    assert isinstance(_core.__version__, str)


@pytest.mark.parametrize("name", [n for n in CLASSES if n.endswith("Error")])
def test_exceptions(name: str) -> None:
    error = getattr(_core, name)
    assert [base.__name__ for base in error.__bases__] == [
        ast.unparse(base) for base in CLASSES[name].bases
    ]
    assert error.__doc__ == ast.get_docstring(CLASSES[name])


@pytest.mark.parametrize("name", TYPES)
def test_members(name: str) -> None:
    functions = stub_functions(CLASSES[name].body)
    described = set(functions) - {"__new__", "__buffer__"}
    special = {"__dlpack__", "__dlpack_device__"}
    members = vars(getattr(_core, name))
    present = {m for m in members if not m.startswith("__") or m in special}
    assert described == present
    for member in described:
        kind = inspect.isgetsetdescriptor(members[member])
        assert kind == is_property(functions[member]), member


@pytest.mark.parametrize("name", TYPES)
def test_signatures(name: str) -> None:
    type_ = getattr(_core, name)
    for member, function in stub_functions(CLASSES[name].body).items():
        if is_property(function) or member == "__buffer__":
            continue
        target = type_ if member == "__new__" else getattr(type_, member)
        assert real_parameters(target) == stub_parameters(function), member


def test_function_signatures() -> None:
    for name, function in stub_functions(TREE.body).items():
        assert real_parameters(getattr(_core, name)) == stub_parameters(function)


@pytest.mark.parametrize("name", TYPES)
def test_final_and_immutable(name: str) -> None:
    type_ = getattr(_core, name)
    assert "final" in [ast.unparse(d) for d in CLASSES[name].decorator_list]
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Derived", (type_,), {})
    with pytest.raises(TypeError, match="immutable"):
        type_.extra = 1
    if "__new__" not in stub_functions(CLASSES[name].body):
        with pytest.raises(TypeError, match="cannot create"):
            type_()


@pytest.mark.parametrize("name", TYPES)
def test_everything_is_documented(name: str) -> None:
    type_ = getattr(_core, name)
    assert type_.__doc__
    for member, value in vars(type_).items():
        if not member.startswith("__"):
            assert value.__doc__, member
