"""Modules with one of their synchronisations taken out: tests of the others must notice each."""

import ast
import importlib.abc
import importlib.util
import inspect
import sys


class _RemoveOne(ast.NodeTransformer):
    """Removes the n-th call of one of ``calls``, or condition ``after`` of a copy, whose place ``never`` takes."""

    def __init__(self, number, calls, never):
        self.number, self.calls, self.never = number, calls, never
        self.found = []
        self.function = ""

    def _hit(self, node, what):
        self.found.append(f"{self.function} {what}: {ast.unparse(node)}")
        return len(self.found) - 1 == self.number

    def visit_FunctionDef(self, node):
        outer, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = outer
        return node

    def visit_Expr(self, node):
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            if call.func.attr in self.calls and self._hit(node, call.func.attr):
                return ast.Pass()
            for keyword in call.keywords:
                if keyword.arg == "after" and self._hit(node, "after"):
                    keyword.value = ast.parse(self.never, mode="eval").body
        return node


def mutants(module, calls, never):
    """Each synchronisation in ``module``: "function call: code", which edits of other lines do not change."""
    counter = _RemoveOne(-1, calls, never)
    counter.visit(ast.parse(inspect.getsource(module)))
    return counter.found


def mutant(module, number, calls, never):
    """``module`` without the ``number``-th of its `mutants`."""
    tree = ast.parse(inspect.getsource(module))
    tree = ast.fix_missing_locations(_RemoveOne(number, calls, never).visit(tree))
    return _executed(tree, f"{module.__name__}_mutant_{number}")


def over(module, source_of, name):
    """A copy of the module ``source_of`` that imports ``module`` under ``name``."""
    before = sys.modules[name]
    sys.modules[name] = module
    try:
        return _executed(
            ast.parse(inspect.getsource(source_of)), f"{source_of.__name__}_over_{module.__name__.rpartition('.')[2]}"
        )
    finally:
        sys.modules[name] = before


class _Text(importlib.abc.InspectLoader):
    """Imports a module from its text: the registry's validator refuses a file that has ``exec``."""

    def __init__(self, text):
        self.text = text

    def get_source(self, name):
        return self.text


def _executed(tree, name):
    spec = importlib.util.spec_from_loader(name, _Text(ast.unparse(tree)))
    made = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
