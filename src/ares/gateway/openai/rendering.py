"""Chat templates, rendered as transformers renders them (utils/chat_template_utils.py, 5.19), without transformers.

tests/gateway/openai/test_rendering.py compares the two.
"""

import json
from copy import deepcopy
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Arguments of `apply_chat_template` for the use of the text: no template gets them.
_NOT_VARIABLES = (
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)
# Marks the end of the message to continue; it is cut off, with all that the template puts after it.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class _Generation(Extension):
    """The block ``{% generation %}``, which marks the model's messages: here it is just its text."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block with a scope of its own: what it sets is not seen behind it.
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Macro) -> str:
        return str(caller())


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own, it does not escape what has a meaning in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - local time, as templates expect it


def _environment() -> Environment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return made


ENVIRONMENT = _environment()
"""Knows all that a chat template may use."""


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return ENVIRONMENT.from_string(template)


def render(
    template: str,
    messages: list[dict[str, Any]],
    /,
    *,
    tools: list[dict[str, Any]] | None = None,
    documents: Any = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """Return the text of a conversation.

    Parameters
    ----------
    template
        Jinja source.
    messages, tools, documents, add_generation_prompt, variables
        What the template gets.
    continue_final_message
        End the text with that of the final message, for the model to continue.

    Raises
    ------
    ValueError, TypeError
        These do not go together.
    Exception
        Any that the template raises: `jinja2.TemplateSyntaxError` where it is none.
    """
    if not messages:
        raise ValueError("there are no messages")
    if variables.get("return_assistant_tokens_mask"):
        raise ValueError("return_assistant_tokens_mask is not offered")
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt are not compatible")
    compiled = _compiled(template)
    if documents is not None and not all(isinstance(document, dict) for document in documents):
        raise TypeError("documents should be a list of objects")
    final = ""
    if continue_final_message:
        messages, final = _marked(messages, template)
    text = compiled.render(
        messages=messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        **{name: value for name, value in variables.items() if name not in _NOT_VARIABLES},
    )
    return _until_mark(text, final) if continue_final_message else text


def _marked(messages: list[dict[str, Any]], template: str) -> tuple[list[dict[str, Any]], str]:
    """Return the messages with the mark at the end of the last one, and the text before it."""
    messages = deepcopy(messages)
    last = messages[-1]
    content = last.get("content")
    if content is None:
        raise ValueError("continue_final_message is set, but the final message has no content to continue")
    if "content" not in template:
        raise ValueError("continue_final_message is set, but the template takes no content")
    if not isinstance(content, list):
        last["content"] = content + _MARK
        return messages, content
    for part in reversed(content):
        if "text" in part:
            text: str = part["text"]
            part["text"] = text + _MARK
            return messages, text
    raise ValueError("continue_final_message is set, but the final message has no text to continue")


def _until_mark(text: str, final: str) -> str:
    mark = _MARK.strip()
    if final.strip() not in text or mark not in text:
        raise ValueError(
            "continue_final_message is set, but the template does not keep the final message as it is: "
            f"{final.strip()!r}"
        )
    at = text.rindex(mark)
    # Where the template trims the message, what it put before the mark goes too.
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
