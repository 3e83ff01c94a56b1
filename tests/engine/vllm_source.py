"""vLLM's source read without importing it: which names its modules have, and which attributes its classes."""

import ast
import functools
from collections.abc import Callable, Iterator

# From a path inside the package's parent folder to a file's text; None where there is no such file.
Reader = Callable[[str], str | None]


class Source:
    """The modules of one version."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self.module = functools.cache(self._module)

    def _module(self, name: str) -> tuple[ast.Module, bool] | None:
        """Return a module's tree, and whether it is a package; None where there is no such module."""
        path = name.replace(".", "/")
        for file, package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
            if (text := self._read(file)) is not None:
                return ast.parse(text), package
        return None

    def has(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something: a definition, an import, or a module below it."""
        found = self.module(module)
        if found is None:
            return False
        return any(name in names_of(node) for node in ast.walk(found[0])) or self.module(f"{module}.{name}") is not None

    def find_class(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """Return a class and the module that defines it, by way of the imports of others."""
        found = self.module(module)
        if found is None:
            return None
        tree, package = found
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name and (origin := absolute(node, module, package)) != module:
                        return self.find_class(origin, alias.name)
        return None

    def mro(self, module: str, name: str) -> Iterator[ast.ClassDef]:
        """Yield a class and its bases, as far as they are vLLM's."""
        found = self.find_class(module, name)
        if found is None:
            return
        origin, node = found
        yield node
        for base in node.bases:
            target = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(target, ast.Name):
                yield from self.mro(origin, target.id)

    def has_attribute(self, module: str, name: str, attribute: str) -> bool:
        """Whether a class, or a base of it, defines or declares the attribute, or assigns it on an object."""
        return any(
            attribute in names_of(node) or (is_stored(node) and node.attr == attribute)  # type: ignore[attr-defined]
            for owner in self.mro(module, name)
            for node in ast.walk(owner)
        )

    def parameters(self, module: str, name: str, method: str) -> list[str] | None:
        """Return the names of a method's parameters; None where no class of the MRO has it."""
        for owner in self.mro(module, name):
            for node in owner.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == method:
                    return parameters(node)
        return None


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of a function's parameters."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [argument.arg for argument in every if argument is not None]


def is_stored(node: ast.AST) -> bool:
    """Whether it is an attribute that is assigned."""
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def names_of(node: ast.AST) -> set[str]:
    """Return the names that a statement defines, declares or imports."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return {name}
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return {alias.asname or alias.name for alias in aliases}
        case ast.Name(id=name, ctx=ast.Store()):
            return {name}
    return set()


def absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    """Return the module that an import names, which may be relative to the one that it stands in."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + package]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(tree: ast.Module, release: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Yield module and name of every import from vLLM that a file of ours does on a release of it.

    A branch on ``RELEASE`` is decided; of other branches, all are taken.
    """
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.If):
            test = node.test
            if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "RELEASE":
                assert isinstance(test.ops[0], ast.GtE), "compare RELEASE by >=, for this check to understand it"
                waiting += node.body if release >= ast.literal_eval(test.comparators[0]) else node.orelse
            else:
                waiting += [*node.body, *node.orelse]
