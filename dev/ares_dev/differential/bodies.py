"""The table of requests: for each name a route and a body; the model's name is added when it is sent."""

from collections.abc import Collection
from typing import Any

Request = tuple[str, dict[str, Any]]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# The context of the cluster (conftest.TINY_FLAGS).
CONTEXT = 4096

_USER = {"role": "user", "content": "Say hello in three words."}
_CALL = {"id": "call_a1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
_RESULT = {"role": "tool", "tool_call_id": "call_a1", "content": "4 C"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}},
    },
}
# Characters of several bytes, of several tokens, and of several code points.
_EMOJI = "🦜🧡 naïve — 漢字 👩‍👩‍👧"
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_EACH_USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


def chat(**fields: Any) -> Request:
    """Return a greedy chat of 8 tokens with these fields."""
    return CHAT, {"messages": [_USER], "temperature": 0, "max_tokens": 8, **fields}


def text(**fields: Any) -> Request:
    """Return a greedy completion of 8 tokens with these fields."""
    return TEXT, {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8, **fields}


def says(*messages: dict[str, Any], **fields: Any) -> Request:
    """Return a chat of these messages."""
    return chat(messages=list(messages), **fields)


def prompt(length: int) -> list[int]:
    """Return a prompt of this many tokens."""
    return [(7 * i) % 900 + 100 for i in range(length)]


def _choice(text_: str, **fields: Any) -> dict[str, Any]:
    return {"structured_outputs": {"choice": [text_]}, "max_tokens": 80, **fields}


_PLAIN = {
    "chat": chat(),
    "text": text(),
    "chat stream": chat(stream=True),
    "chat stream with usage": chat(**_USAGE),
    "chat stream with usage in each chunk": chat(**_EACH_USAGE),
    "text stream": text(stream=True),
    "text stream with usage": text(**_USAGE),
    "text stream with usage in each chunk": text(**_EACH_USAGE),
    "stream options without a stream": chat(stream_options={"include_usage": True}),
    "usage not included": text(stream=True, stream_options={"include_usage": False}),
    "one token": chat(max_tokens=1),
    "one token, stream": chat(max_tokens=1, **_USAGE),
    "one token of text": text(max_tokens=1),
    "two tokens": chat(max_tokens=2),
    "max_completion_tokens": chat(max_tokens=None, max_completion_tokens=3),
    "both limits": chat(max_tokens=5, max_completion_tokens=3),
    "two choices": chat(n=2, seed=3, temperature=0.9),
    "two choices, stream": chat(n=2, seed=3, temperature=0.9, **_USAGE),
    "two greedy choices": chat(n=2),
    "no choices": text(n=0),
    "null limit": text(max_tokens=None),
    "null fields": chat(n=None, stop=None, seed=None, logprobs=None, tools=None, stream=None, user=None),
    "empty model": text(model=""),
    "unknown model": text(model="nobody/nothing"),
    "user": chat(user="ann"),
    "token ids": text(return_token_ids=True),
    "token ids of a chat": chat(return_token_ids=True),
    "token ids, stream": text(stream=True, return_token_ids=True),
    "token ids of a chat, stream": chat(stream=True, return_token_ids=True),
    "prompt text": chat(return_prompt_text=True),
    "cache salt": text(cache_salt="abcd"),
    "empty cache salt": text(cache_salt=""),
    "vllm_xargs": text(vllm_xargs={"x": 1}),
    "unknown field": text(surprise=1),
    "stream_interval": chat(max_tokens=20, stream_interval=4, **_USAGE),
}

_CHARACTERS = {
    "characters": chat(**_choice(_EMOJI)),
    "characters with logprobs": chat(**_choice(_EMOJI), logprobs=True, top_logprobs=2),
    "characters of text with logprobs": text(**_choice(_EMOJI), logprobs=2),
    "characters, stream": chat(**_choice(_EMOJI), **_USAGE),
    "characters with logprobs, stream": chat(**_choice(_EMOJI), logprobs=True, **_USAGE),
    "characters of text with logprobs, stream": text(**_choice(_EMOJI), logprobs=1, **_USAGE),
    "stop at a character": chat(**_choice(_EMOJI), stop=["🧡"]),
    "stop at a character, included": chat(**_choice(_EMOJI), stop=["🧡"], include_stop_str_in_output=True),
    "stop at a character, stream": chat(**_choice(_EMOJI), stop=["漢"], **_USAGE),
    "cut in a character": chat(**_choice(_EMOJI, max_tokens=2)),
    "cut in a character, stream": chat(**_choice(_EMOJI, max_tokens=2), stream=True),
    "cut in a character with logprobs": chat(**_choice(_EMOJI, max_tokens=3), logprobs=True, top_logprobs=1),
    "prompt of characters": text(prompt=_EMOJI),
    "prompt of special tokens as text": text(prompt="<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
    "prompt with a null byte": text(prompt="a\u0000b"),
    "prompt of newlines": text(prompt="\n\n\n"),
    "prompt of a space": text(prompt=" "),
}

_LOGPROBS = {
    "logprobs of one token": chat(max_tokens=1, logprobs=True, top_logprobs=3),
    "logprobs 0": text(logprobs=0),
    "logprobs 1": text(logprobs=1),
    "logprobs of allowed tokens": text(logprobs=5, allowed_token_ids=[260, 253, 284], max_tokens=4),
    "logprobs of allowed tokens, chat": chat(
        logprobs=True, top_logprobs=5, allowed_token_ids=[260, 253, 284], max_tokens=4
    ),
    "logprobs under a grammar": chat(
        logprobs=True, top_logprobs=5, structured_outputs={"choice": ["yes"]}, max_tokens=4
    ),
    "logprobs without top": chat(logprobs=True),
    "logprobs with top 0": chat(logprobs=True, top_logprobs=0),
    "top without logprobs": chat(top_logprobs=2),
    "too many logprobs": chat(logprobs=True, top_logprobs=21),
    "too many logprobs of text": text(logprobs=21),
    "logprobs -1": text(logprobs=-1, max_tokens=1),
    "logprobs -2": text(logprobs=-2),
    "logprobs as ids": text(logprobs=1, return_tokens_as_token_ids=True),
    "logprobs as ids, chat": chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True),
    "logprobs of given ids": text(logprobs=1, logprob_token_ids=[260, 253]),
    "logprobs, stream": chat(logprobs=True, top_logprobs=1, **_USAGE),
    "logprobs of text, stream": text(stream=True, logprobs=1),
    "logprobs at a stop string": text(stop=["e"], max_tokens=20, logprobs=1),
    "logprobs at a stop string, stream": text(stop=["e"], max_tokens=20, logprobs=1, stream=True),
    "logprobs at a stop string, chat": chat(stop=["e"], max_tokens=20, logprobs=True, top_logprobs=1),
    "logprobs of two choices": text(n=2, seed=5, temperature=1.0, logprobs=2),
    "logprobs of a sampled token": text(seed=5, temperature=1.3, logprobs=1),
    "logprobs of prompts": text(prompt=["one", "two"], logprobs=1, max_tokens=3),
    "logprobs of the prompt": text(prompt_logprobs=1),
    "echo with logprobs": text(echo=True, logprobs=1, max_tokens=1),
}

_SAMPLING = {
    "bias": text(logit_bias={"260": 100}),
    "bias beyond 100": text(logit_bias={"260": 1000.0}),
    "bias against": text(logit_bias={"260": -1000.0, "842": -100}),
    "bias of an unknown token": text(logit_bias={"99999999": 1}),
    "seed of two choices": text(temperature=0.9, seed=7, n=2),
    "seed below 0": text(temperature=0.9, seed=-5),
    "seed": chat(temperature=1.1, seed=11, max_tokens=20),
    "penalties": text(frequency_penalty=1.5, presence_penalty=0.5, max_tokens=24),
    "repetition penalty": text(repetition_penalty=1.3, max_tokens=24),
    "penalty out of range": text(frequency_penalty=3),
    "bad words": text(bad_words=[" Paris"], max_tokens=6),
    "top_k 0": text(top_k=0, temperature=0.5, seed=3),
    "top_k -1": text(top_k=-1, temperature=0.5, seed=3),
    "top_k": text(top_k=5, temperature=0.8, seed=3),
    "top_p": text(top_p=0.7, temperature=0.8, seed=3),
    "top_p 1": text(top_p=1.0),
    "top_p 0": text(top_p=0.0),
    "min_p": text(min_p=0.3, temperature=0.8, seed=3),
    "tiny temperature": text(temperature=1e-9, seed=3),
    "temperature below 0": text(temperature=-1),
    "repetition detected": text(
        prompt="a a a a a a a a",
        max_tokens=80,
        ignore_eos=True,
        repetition_detection={"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 5},
    ),
    "priority": chat(priority=0),
}

_STOPS = {
    "stop strings": text(stop=["e", "."], max_tokens=20),
    "stop string over tokens": text(stop=["s. T", "er "], max_tokens=20),
    "stop string over tokens, stream": text(stop=["s. T", "er "], max_tokens=20, **_USAGE),
    "a stop string": text(stop="e", max_tokens=20),
    "a stop string, included": text(stop="e", max_tokens=20, include_stop_str_in_output=True),
    "empty stop string": text(stop=""),
    "many stop strings": text(stop=[f"zz{number}" for number in range(20)]),
    "four stop strings": text(stop=["zz1", "zz2", "zz3", "zz4"]),
    "stop tokens": text(stop_token_ids=[30, 260, 284], max_tokens=20),
    "stop tokens, included": text(stop_token_ids=[30, 260, 284], max_tokens=20, include_stop_str_in_output=True),
    "least tokens before a stop": text(min_tokens=5, stop=["e"], max_tokens=20),
    "least tokens": chat(min_tokens=30, max_tokens=40),
    "more least than most tokens": chat(min_tokens=30, max_tokens=10),
    "special tokens shown": chat(max_tokens=60, skip_special_tokens=False),
    "special tokens and the stop shown": chat(
        max_tokens=60, skip_special_tokens=False, include_stop_str_in_output=True
    ),
    "end ignored": chat(max_tokens=60, ignore_eos=True),
    "end ignored and shown": chat(max_tokens=60, ignore_eos=True, skip_special_tokens=False),
    "end at once": chat(logit_bias={"2": 100}),
    "end at once, stream": chat(logit_bias={"2": 100}, **_USAGE),
    "end at once, text": text(logit_bias={"2": 100}, logprobs=1),
}

_STRUCTURED = {
    "text format": chat(response_format={"type": "text"}),
    "json object": chat(response_format={"type": "json_object"}, max_tokens=30),
    "json schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "t", "strict": True, "schema": _SCHEMA}},
        max_tokens=30,
    ),
    "json schema, stream": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": _SCHEMA}},
        max_tokens=30,
        **_USAGE,
    ),
    "empty json schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": {}}}, max_tokens=10
    ),
    "json schema without a schema": chat(response_format={"type": "json_schema"}),
    "json schema of text": text(
        response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": _SCHEMA}}, max_tokens=30
    ),
    "structural tag": chat(
        response_format={
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}],
            "triggers": ["<f>"],
        },
        max_tokens=6,
    ),
    "regular expression": text(structured_outputs={"regex": "[0-9]{4}-[0-9]{2}"}, max_tokens=12),
    "grammar": text(structured_outputs={"grammar": 'root ::= "a" | "b"'}, max_tokens=12),
    "json of structured outputs": text(structured_outputs={"json": _SCHEMA}, max_tokens=30),
    "two kinds of structured outputs": text(structured_outputs={"regex": "a", "choice": ["b"]}),
    "no kind of structured outputs": text(structured_outputs={}),
    "unknown response format": chat(response_format={"type": "xml"}),
}

_PROMPTS = {
    "echo": text(echo=True),
    "echo of ids": text(prompt=[504, 357, 282, 464, 314], echo=True),
    "echo, stream": text(stream=True, echo=True, n=2, seed=1, temperature=1.0),
    "echo and no tokens": text(echo=True, max_tokens=0),
    "no tokens": text(max_tokens=0),
    "echo of prompts": text(prompt=["one", "two"], echo=True, max_tokens=2),
    "truncated": text(truncate_prompt_tokens=2),
    "truncated on the left": text(truncate_prompt_tokens=2, truncation_side="left"),
    "truncated to what fits": text(truncate_prompt_tokens=-1, prompt=prompt(CONTEXT + 100), max_tokens=1),
    "no special tokens": text(add_special_tokens=False),
    "127 tokens": text(prompt=prompt(127), max_tokens=4),
    "128 tokens": text(prompt=prompt(128), max_tokens=4),
    "129 tokens": text(prompt=prompt(129), max_tokens=4),
    "256 tokens": text(prompt=prompt(256), max_tokens=1),
    "one token of prompt": text(prompt=[504], max_tokens=4),
    "one token left": text(prompt=prompt(CONTEXT - 1), max_tokens=1),
    "one token left of two": text(prompt=prompt(CONTEXT - 1), max_tokens=2),
    "two tokens left": text(prompt=prompt(CONTEXT - 2), max_tokens=2),
    "six tokens left": text(prompt=prompt(CONTEXT - 6), max_tokens=6, ignore_eos=True),
    "no token left": text(prompt=prompt(CONTEXT), max_tokens=1),
    "too long": text(prompt=prompt(CONTEXT + 1), max_tokens=1),
    "unknown token": text(prompt=[1, 10**9]),
    "token below 0": text(prompt=[-1]),
    "prompts of two kinds": text(prompt=["one", [504, 357]], max_tokens=2),
    "equal prompts": text(prompt=["one", "one", "two"], max_tokens=2),
    "prompts, stream": text(prompt=["one", "two"], max_tokens=3, **_USAGE),
    "prompts of ids": text(prompt=[[504, 357], [282]], max_tokens=2, n=2, seed=1, temperature=1.0),
    "no prompt": text(prompt=[]),
    "empty prompt": text(prompt=""),
    "null prompt": text(prompt=None),
    "suffix": text(suffix="."),
    "best_of": text(best_of=2),
}

_MESSAGES = {
    "parts": says(
        {"role": "user", "content": [{"type": "text", "text": "Say hello"}, {"type": "text", "text": "in 3 words."}]}
    ),
    "a part of the system": says({"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, _USER),
    "empty parts": says({"role": "user", "content": []}),
    "plain texts as parts": says({"role": "user", "content": ["Say", "hello"]}),
    "unknown part": says({"role": "user", "content": [{"type": "smell", "smell": "tea"}]}),
    "image": says(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            ],
        }
    ),
    "null content of a call": says(_USER, {"role": "assistant", "content": None, "tool_calls": [_CALL]}, _RESULT),
    "no content of a call": says(_USER, {"role": "assistant", "tool_calls": [_CALL]}, _RESULT),
    "empty calls": says(_USER, {"role": "assistant", "content": "Hello", "tool_calls": []}, _USER),
    "arguments that are no JSON": says(
        _USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**_CALL, "function": {"name": "get_weather", "arguments": "{"}}],
        },
        _RESULT,
    ),
    "empty arguments": says(
        _USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**_CALL, "function": {"name": "get_weather", "arguments": ""}}],
        },
        _RESULT,
    ),
    "parts of a result": says(
        _USER,
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {**_RESULT, "content": [{"type": "text", "text": "4 C"}]},
    ),
    "developer": says({"role": "developer", "content": "Be brief."}, _USER),
    "name": says({"role": "user", "name": "ann", "content": "hi"}),
    "system only": says({"role": "system", "content": "You are a clock."}),
    "empty content": says({"role": "user", "content": ""}),
    "null content": says({"role": "user", "content": None}),
    "no content": says({"role": "user"}),
    "assistant last": says(_USER, {"role": "assistant", "content": "Hello"}),
    "reasoning in the history": says(
        _USER, {"role": "assistant", "reasoning": "Three words.", "content": "Hello"}, _USER
    ),
    "no role": says({"content": "hi"}),
    "unknown role": says({"role": "oracle", "content": "hi"}),
    "no messages": chat(messages=[]),
    "messages as text": chat(messages="hi"),
    "continued": says(
        _USER,
        {"role": "assistant", "content": "Hello, my"},
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "continued with a generation prompt": says(
        _USER, {"role": "assistant", "content": "Hello, my"}, continue_final_message=True
    ),
    "echo of a chat": says(
        _USER,
        {"role": "assistant", "content": "Hello, my"},
        add_generation_prompt=False,
        continue_final_message=True,
        echo=True,
    ),
    "no generation prompt": chat(add_generation_prompt=False),
    "template": chat(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    "template settings": chat(chat_template_kwargs={"enable_thinking": False}),
    "documents": chat(documents=[{"title": "a", "text": "b"}]),
    "reasoning effort": chat(reasoning_effort="low"),
    "tools not used": chat(tools=[TOOL], tool_choice="none"),
    "tool choice without tools": chat(tool_choice="auto"),
    "no tools": chat(tools=[]),
}

_ASK = {"role": "user", "content": "What is the weather in Oslo? Use the tool."}
_BOTH = {"role": "user", "content": "What is the weather in Oslo, and what is it in Rome? Call the tool once for each."}
_ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}


def calls(*messages: dict[str, Any], **fields: Any) -> Request:
    """Return a chat of these messages with tools."""
    return says(*(messages or (_ASK,)), **{"tools": [TOOL, _ADD], "max_tokens": 60, **fields})


_TOOLS = {
    "auto": calls(),
    "auto, stream": calls(**_USAGE),
    "auto, said": calls(tool_choice="auto", **_USAGE),
    "required": calls(tool_choice="required"),
    "required, stream": calls(tool_choice="required", **_USAGE),
    "named": calls(tool_choice=_NAMED),
    "named, stream": calls(tool_choice=_NAMED, **_USAGE),
    "none": calls(tool_choice="none"),
    "none, stream": calls(tool_choice="none", **_USAGE),
    "null choice": calls(tool_choice=None),
    "one at a time": calls(_BOTH, parallel_tool_calls=False),
    "several": calls(_BOTH, max_tokens=100),
    "several, stream": calls(_BOTH, max_tokens=100, **_USAGE),
    "several required, stream": calls(_BOTH, max_tokens=100, tool_choice="required", **_USAGE),
    "cut": calls(max_tokens=12),
    "cut, stream": calls(max_tokens=12, **_USAGE),
    "cut, required": calls(max_tokens=12, tool_choice="required"),
    "cut, named, stream": calls(max_tokens=12, tool_choice=_NAMED, **_USAGE),
    "result": calls(_ASK, {"role": "assistant", "content": None, "tool_calls": [_CALL]}, _RESULT),
    "result, stream": calls(_ASK, {"role": "assistant", "content": None, "tool_calls": [_CALL]}, _RESULT, **_USAGE),
    "logprobs": calls(logprobs=True, top_logprobs=1),
    "logprobs, stream": calls(logprobs=True, top_logprobs=1, **_USAGE),
    "token ids": calls(return_token_ids=True),
    "token ids, stream": calls(return_token_ids=True, **_USAGE),
    "choices": calls(n=2, seed=2, temperature=0.8),
    "choices, stream": calls(n=2, seed=2, temperature=0.8, **_USAGE),
    "stop string": calls(stop=["Oslo"]),
    "stop string, stream": calls(stop=["Oslo"], **_USAGE),
    "schema": calls(response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": _SCHEMA}}),
    "unknown name": calls(tool_choice={"type": "function", "function": {"name": "nothing"}}),
    "unknown choice": calls(tool_choice="sometimes"),
    "choice without tools": says(_ASK, tool_choice="required"),
    "strict": calls(tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}], tool_choice="required"),
    "no parameters": calls(tools=[{"type": "function", "function": {"name": "now"}}], tool_choice="required"),
    "reasoning not shown": calls(include_reasoning=False),
    "special tokens shown": calls(skip_special_tokens=False),
}

_TOKENS: dict[str, Request] = {
    "text": ("/tokenize", {"prompt": "The capital of France is"}),
    "text without special tokens": ("/tokenize", {"prompt": "The capital", "add_special_tokens": False}),
    "names": ("/tokenize", {"prompt": _EMOJI, "return_token_strs": True}),
    "chat": ("/tokenize", {"messages": [_USER]}),
    "chat without a generation prompt": ("/tokenize", {"messages": [_USER], "add_generation_prompt": False}),
    "chat with tools": ("/tokenize", {"messages": [_USER], "tools": [TOOL]}),
    "empty text": ("/tokenize", {"prompt": ""}),
    "no text": ("/tokenize", {}),
    "tokens": ("/detokenize", {"tokens": [504, 357, 282]}),
    "no tokens": ("/detokenize", {"tokens": []}),
    "unknown tokens": ("/detokenize", {"tokens": [10**9]}),
    "tokens below 0": ("/detokenize", {"tokens": [-1]}),
    "tokens as text": ("/detokenize", {"tokens": "abc"}),
}


def responds(**fields: Any) -> Request:
    """Return a request of `/v1/responses`."""
    return "/v1/responses", {"input": "Say hello in three words.", "temperature": 0, "max_output_tokens": 8, **fields}


def message(**fields: Any) -> Request:
    """Return a request of `/v1/messages`."""
    return "/v1/messages", {"messages": [_USER], "temperature": 0, "max_tokens": 8, **fields}


_RESPONSES = {
    "text": responds(),
    "instructions": responds(instructions="Be brief."),
    "messages": responds(input=[{"role": "user", "content": "Say hello"}]),
    "parts": responds(input=[{"role": "user", "content": [{"type": "input_text", "text": "Say hello"}]}]),
    "history": responds(
        input=[_USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Again"}]
    ),
    "sampled": responds(temperature=0.9, seed=4),
    "no store": responds(store=False),
    "too long": responds(input="a " * 3 * CONTEXT),
    "no input": responds(input=None),
    "schema": responds(text={"format": {"type": "json_schema", "name": "t", "schema": _SCHEMA}}, max_output_tokens=30),
    "unknown model": responds(model="nobody/nothing"),
}

_ANTHROPIC = {
    "text": message(),
    "system": message(system="Be brief."),
    "system in parts": message(system=[{"type": "text", "text": "Be brief."}]),
    "parts": message(messages=[{"role": "user", "content": [{"type": "text", "text": "Say hello"}]}]),
    "history": message(
        messages=[_USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Again"}]
    ),
    "stop": message(stop_sequences=["e"], max_tokens=20),
    "no messages": message(messages=[]),
    "no limit": message(max_tokens=None),
    "count": ("/v1/messages/count_tokens", {"messages": [_USER]}),
    "count with a system": ("/v1/messages/count_tokens", {"messages": [_USER], "system": "Be brief."}),
}

SECTIONS: dict[str, dict[str, Request]] = {
    "plain": _PLAIN,
    "characters": _CHARACTERS,
    "logprobs": _LOGPROBS,
    "sampling": _SAMPLING,
    "stops": _STOPS,
    "structured": _STRUCTURED,
    "prompts": _PROMPTS,
    "messages": _MESSAGES,
    "tokens": _TOKENS,
    "responses": _RESPONSES,
    "anthropic": _ANTHROPIC,
    "tools": _TOOLS,
}
# They need a parser of tool calls, also on the server that is compared with.
PARSED = ("tools",)


def table(sections: Collection[str] = SECTIONS.keys() - set(PARSED)) -> dict[str, Request]:
    """Return the requests of some sections by `SECTION/NAME`."""
    return {f"{key}/{name}": row for key, rows in SECTIONS.items() if key in sections for name, row in rows.items()}
