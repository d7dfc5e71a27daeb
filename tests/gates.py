"""The gates that keep the source in shape: each takes source and returns a list of violations.

They are pure functions, so that `test_architecture.py` can both apply them to the repository and
plant an error in front of each of them.
"""

import ast
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Tree = Mapping[
    str, ast.Module
]  # dotted module name, a package as "lamina.x.__init__" -> its syntax
Imports = list[tuple[str, int, bool]]  # (module imported, line, whether lazy)

ROOT_PACKAGE = "lamina"


# ------------------------------------------------------------------------------- reading the source


def read_tree(package: Path) -> dict[str, ast.Module]:
    """Parse every Python file below the folder of the package."""
    return {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): ast.parse(
            path.read_text(encoding="utf-8"), filename=str(path)
        )
        for path in sorted(package.rglob("*.py"))
    }


def layer_of(module: str) -> str:
    """Name of the part of the package that a module is in: `lamina.optim.sgd` is in `optim`."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or "__init__"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, however deep."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _import_nodes(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Each import with whether it is lazy: in a function, or for the type checker only."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, lazy = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
            stack.extend((child, True) for child in node.body)
            stack.extend((child, lazy) for child in node.orelse)
        else:
            stack.extend((child, lazy) for child in ast.iter_child_nodes(node))


def _base(module: str, node: ast.ImportFrom) -> str:
    """Absolute name of what stands after `from`, relative dots resolved."""
    if not node.level:
        return node.module or ""
    package = module.split(".")[: -node.level]
    return ".".join((*package, *(node.module.split(".") if node.module else ())))


def imports(module: str, source: Tree) -> Imports:
    """Modules of our own package that a module imports."""
    found: Imports = []
    for node, lazy in _import_nodes(source[module]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = _base(module, node)
            targets = [
                f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}", source) else base
                for alias in node.names
            ]
        ours = {name for name in targets if name.split(".")[0] == ROOT_PACKAGE}
        found.extend((_file_of(name, source), node.lineno, lazy) for name in sorted(ours))
    return found


def _is_module(name: str, source: Tree) -> bool:
    return name in source or f"{name}.__init__" in source


def _file_of(name: str, source: Tree) -> str:
    """`lamina.optim` is the file `lamina.optim.__init__`."""
    return name if name in source else f"{name}.__init__"


# --------------------------------------------------------------------------------------- the gates


def unlisted_modules(source: Tree, layers: Sequence[str]) -> list[str]:
    """Top-level modules that have no place in the list of layers."""
    return sorted({layer_of(module) for module in source} - set(layers))


def upward_imports(
    source: Tree, layers: Sequence[str], allowed: Mapping[tuple[str, str], str]
) -> list[str]:
    """Imports of a higher layer; a lazy one may be allowed as `(module, layer): reason`."""
    rank = {layer: place for place, layer in enumerate(layers)}
    return [
        f"{module}:{line} imports {target}, which is above it"
        for module in source
        if (own := rank.get(layer_of(module))) is not None  # else unlisted_modules tells
        for target, line, lazy in imports(module, source)
        if rank.get(layer_of(target), own) > own
        and not (lazy and allowed.get((module, layer_of(target))))
    ]


def unused_allowances(source: Tree, allowed: Mapping[tuple[str, str], str]) -> list[str]:
    """Entries of the allow-list that no lazy import needs any more."""
    used = {
        (module, layer_of(target))
        for module in source
        for target, _, lazy in imports(module, source)
        if lazy
    }
    return [f"{module} -> {layer}" for module, layer in allowed if (module, layer) not in used]


def import_cycles(source: Tree) -> list[str]:
    """Modules from which module-level imports lead back to themselves, one line a cycle."""
    graph = {
        module: {target for target, _, lazy in imports(module, source) if not lazy}
        for module in source
    }
    done: set[str] = set()
    cycles: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return cycles


def import_groups(source: Tree, allowed: Mapping[tuple[str, str], str]) -> list[list[str]]:
    """Groups of modules that all reach one another, imports in functions and for types counted.

    A lazy import `(module, module imported)` that is allowed, with its reason, does not count.
    """
    graph = {
        module: {
            target
            for target, _, lazy in imports(module, source)
            if not (lazy and allowed.get((module, target)))
        }
        for module in source
    }
    reached = {module: _reached(module, graph) for module in graph}
    groups = {
        tuple(sorted(o for o in there if module in reached.get(o, ()) or o == module))
        for module, there in reached.items()
        if module in there
    }
    return sorted((list(group) for group in groups), key=lambda group: (-len(group), group))


def _reached(module: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Every module to which imports lead from one; itself only where they lead back."""
    found: set[str] = set()
    stack = list(graph[module])
    while stack:
        target = stack.pop()
        if target not in found:
            found.add(target)
            stack.extend(graph.get(target, ()))
    return found


def unused_exceptions(source: Tree, allowed: Mapping[tuple[str, str], str]) -> list[str]:
    """Allowed lazy imports that are not there, or that are in no cycle, or without a reason."""
    groups = import_groups(source, {})
    found: list[str] = []
    for (module, target), reason in allowed.items():
        lazy = {name for name, _, lazy in imports(module, source) if lazy}
        closes = any({module, target} <= set(group) for group in groups)
        if not (reason and target in lazy and closes):
            found.append(f"{module} -> {target}")
    return found


def _isort_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, each by name: the order that ruff keeps too."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def door_violations(tree: ast.Module) -> list[str]:
    """`__all__` is a sorted literal and names exactly what the file binds without underscore."""
    bound: set[str] = set()
    exported: list[str] | None = None
    for node in tree.body:
        names = _bound_names(node)
        if "__all__" in names and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            exported = list(ast.literal_eval(node.value))
        bound |= names
    if exported is None:
        return ["no __all__"]
    public = {name for name in bound if not name.startswith("_")}
    found = [f"{name} is bound but not in __all__" for name in sorted(public - set(exported))]
    if exported != sorted(set(exported), key=_isort_order):
        found.append("__all__ is not sorted, or holds a name twice")
    if "*" in bound:
        found.append("import * hides what the door shows")
    return found


def _bound_names(node: ast.stmt) -> set[str]:
    """Names that a statement at the top of a module binds."""
    match node:
        case ast.ImportFrom(module="__future__"):
            return set()
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name.split(".")[0] for alias in node.names}
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case _:
            stored = (name for name in ast.walk(node) if isinstance(name, ast.Name))
            return {name.id for name in stored if isinstance(name.ctx, ast.Store)}


def unresolved_names(module: object) -> list[str]:
    """Names in `__all__` that the module cannot give."""
    return [name for name in vars(module)["__all__"] if not hasattr(module, name)]


def undocumented_names(module: object) -> list[str]:
    """What the door shows without a docstring; a method may inherit that of a base."""
    found: list[str] = []
    for name in vars(module)["__all__"]:
        value = getattr(module, name)
        if callable(value) and not value.__doc__:
            found.append(name)
        if inspect.isclass(value):
            found.extend(f"{name}.{method}" for method in _undocumented_methods(value))
    return found


def _undocumented_methods(cls: type) -> list[str]:
    kinds = (types.FunctionType, classmethod, staticmethod, property)
    return [
        name
        for name, member in vars(cls).items()
        if isinstance(member, kinds)
        and not name.startswith("_")
        and not any(vars(base)[name].__doc__ for base in cls.__mro__ if name in vars(base))
    ]


def long_functions(tree: ast.Module, limit: int) -> list[str]:
    """Functions of more lines, docstring included, than fit the eye."""
    sizes = [(node, (node.end_lineno or 0) - node.lineno + 1) for node in functions(tree)]
    return [
        f"{node.name}:{node.lineno} has {size} lines, at most {limit}"
        for node, size in sizes
        if size > limit
    ]


def nested_ternaries(tree: ast.Module) -> list[str]:
    """Conditional expressions within another one: two decisions in one breath."""
    inner = lambda node: (child for child in ast.walk(node) if child is not node)  # noqa: E731
    return [
        f"line {node.lineno}: a conditional expression inside another one; write an if statement"
        for node in ast.walk(tree)
        if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in inner(node))
    ]


_NEVER = {"eval", "exec", "builtins.eval", "builtins.exec"}
_PICKLE = {"pickle.load", "pickle.loads", "pickle.Unpickler"}


def unsafe_calls(tree: ast.Module) -> list[str]:
    """Code or objects made from text or files: eval, exec, pickle, torch.load of anything."""
    names = _dotted_aliases(tree)
    found: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func, names)
        unsafe = name in _NEVER | _PICKLE or (name == "torch.load" and not _weights_only(node))
        found.extend([f"line {node.lineno}: {name}"] if unsafe else [])
    return found


def _weights_only(call: ast.Call) -> bool:
    return any(
        keyword.arg == "weights_only"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is True
        for keyword in call.keywords
    )


def _dotted_aliases(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `import torch as t` gives {"t": "torch"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _dotted(node: ast.expr, names: Mapping[str, str] | None = None) -> str:
    """`a.b.c` as text, with imported names written out; empty for anything else."""
    if isinstance(node, ast.Name):
        return (names or {}).get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value, names)
        return f"{head}.{node.attr}" if head else ""
    return ""


_ASSERTING = {"pytest.raises", "pytest.warns", "pytest.fail"}


def tests_without_assertion(tree: ast.Module) -> list[str]:
    """Tests that can only fail by crashing."""
    return [
        f"{test.name}:{test.lineno}"
        for test in functions(tree)
        if test.name.startswith("test_") and not any(map(_asserts, ast.walk(test)))
    ]


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = _last_name(node.func)
    return _dotted(node.func) in _ASSERTING or name.startswith(("assert_", "check_"))


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def each_file(paths: Sequence[Path], gate: Callable[[str], list[str]]) -> list[str]:
    """Apply a gate on text to files; every violation begins with the name of its file."""
    return [
        f"{path.name}: {violation}"
        for path in paths
        for violation in gate(path.read_text(encoding="utf-8"))
    ]
