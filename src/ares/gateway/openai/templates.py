"""What a chat template expects, read from its source as vLLM 0.32 reads it (renderers/hf.py)."""

from collections.abc import Iterator
from functools import lru_cache

from jinja2 import nodes

from ares.gateway.openai.rendering import ENVIRONMENT


def knows_developer(template: str) -> bool:
    """Whether the template has a place for messages of the role `developer`."""
    return '"developer"' in template or "'developer'" in template


@lru_cache(maxsize=8)
def takes_parts(template: str) -> bool:
    """Whether the template goes over the parts of a message's content; otherwise it takes text.

    Raises
    ------
    jinja2.TemplateSyntaxError
        It is no template.
    """
    tree = ENVIRONMENT.parse(template)
    messages = set(_loop_variables(tree, _aliases(tree, "messages")))
    in_macros: dict[nodes.For, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        bound = _content_parameters(tree, macro, messages)
        for loop in macro.find_all(nodes.For):
            in_macros.setdefault(loop, set()).update(bound)
    return any(_over_content(loop, messages, in_macros.get(loop, {"content"})) for loop in tree.find_all(nodes.For))


def _over_content(loop: nodes.For, messages: set[str], names: set[str]) -> bool:
    """Whether a loop goes over a message's content, or over a variable of one of these names."""
    if any(_is(loop.iter, message, "content") for message in messages):
        return True
    return isinstance(loop.iter, nodes.Name) and loop.iter.name in names


def _aliases(tree: nodes.Node, name: str) -> set[str]:
    """Return the variables that hold `name` or elements of it."""
    known = {name}
    while (
        new := {
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and any(_is(assign.node, alias) for alias in known)
        }
        - known
    ):
        known |= new
    return known


def _loop_variables(tree: nodes.Node, lists: set[str]) -> Iterator[str]:
    """Yield the variables of the loops over these lists."""
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name) and any(_is(loop.iter, name) for name in lists):
            yield loop.target.name


def _content_parameters(tree: nodes.Node, macro: nodes.Macro, messages: set[str]) -> set[str]:
    """Return the parameters of a macro that it is called with a message's content for."""
    names = [argument.name for argument in macro.args]
    bound = set[str]()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given = [*zip(names, call.args, strict=False), *((word.key, word.value) for word in call.kwargs)]
            bound |= {name for name, value in given if any(_is(value, message, "content") for message in messages)}
    return bound & set(names)


def _is(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether an expression is a variable, or its attribute `key`; filtered, tested or sliced too."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == key and _is_variable(node.node, name)
    return isinstance(node, nodes.Getattr) and node.attr == key and _is_variable(node.node, name)


def _is_variable(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
