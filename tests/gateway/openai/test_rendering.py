"""Chat templates come out as transformers renders them, and tokenizers as it loads them."""

import importlib.util
import inspect
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import NormalizedString, PreTokenizedString, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from ares.gateway.openai import rendering, tokenizer, tokenizer_files
from ares.gateway.openai.messages import Message, Tool
from ares.gateway.openai.text import TextModel
from ares.models import resolve as model
from ares.models.cache import ModelError, cache_folder
from tests.gateway.openai.test_templates import PARTS, TEXT

TEMPLATES = TEXT | PARTS
TEMPLATES |= {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{{ pad_token }}",
    "everything else": "{{ tools }}|{{ documents }}|{{ add_generation_prompt }}|{{ enable_thinking }}|{{ messages }}",
    "white space": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n{% endif %}\n\n"
    "{% endfor %}",
    "trimmed": "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n<end>{% endfor %}",
    "json": "{{ tools | tojson }}{{ messages | tojson(indent=4) }}"
    "{{ {'b': '<é>', 'a': \"'&\"} | tojson(sort_keys=true) }}"
    "{{ [1, none, 2.5] | tojson(separators=(',', ':')) }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "time": "{{ strftime_now('%Y %B') }}",
    "refused": "{{ raise_exception('no ' + messages[0].role) }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% set n = 1 %}{% endgeneration %}{{ x }}{{ n }}",
    "generation": "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}\n{% endfor %}{{ 1 }}",
    "unsafe": "{{ messages.append(1) }}",
    "private": "{{ messages.__class__.__mro__ }}",
    "undefined": "{{ nothing }}{{ nothing.at.all }}",
    "names": "{{ template }}{{ padding }}{{ return_dict }}{{ max_length }}{{ tokenizer_kwargs }}{{ conversation }}",
    "dropped": "{% for m in messages %}{{ m.role }}{% endfor %}{# content #}",
    "reversed": "{% for m in messages | reverse %}{{ m.content | string | upper }}{% endfor %}",
    "no template": "{% for %}",
    "unknown tag": "{% nothing %}",
    "empty": "",
}
VLLM = importlib.util.find_spec("vllm")
if VLLM is not None and VLLM.origin is not None:
    shipped = Path(VLLM.origin).parent / "transformers_utils" / "chat_templates"
    TEMPLATES |= {file.stem: file.read_text() for file in sorted(shipped.glob("*.jinja"))}
USER = {"role": "user", "content": " u <é> "}
CHATS: list[list[dict[str, Any]]] = [
    [],
    [USER],
    [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "Once upon  "}],
    [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
    [USER, {"role": "assistant", "content": []}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<d>", "parameters": {"type": "object"}}}]
VARIABLES: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True, "tools": TOOLS},
    {"continue_final_message": True},
    {"continue_final_message": True, "add_generation_prompt": True},
    {"documents": [{"title": "t", "text": "x"}], "enable_thinking": False, "bos_token": "mine"},
    {"documents": ["x"]},
    {"documents": 1},
    {"padding": True, "return_dict": False, "max_length": 3, "tokenizer_kwargs": {}, "template": "t"},
    {"return_assistant_tokens_mask": True},
]


def outcome(render: Any) -> tuple[str, str]:
    """Return what comes out, or what kind of error."""
    try:
        return "text", render()
    except TemplateSyntaxError:  # the model's fault, not the client's
        return "no template", ""
    except TemplateError as error:
        return "refused", str(error)
    except Exception as error:
        return "error", type(error).__name__


@pytest.fixture(scope="module")
def theirs(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(model_folder))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_come_out_the_same(theirs: Any, template: str) -> None:
    kinds = set()
    for chat in CHATS:
        for variables in VARIABLES:
            before = json.dumps(chat)
            settings = theirs.special_tokens_map | variables
            made = outcome(lambda c=chat, s=settings: rendering.render(template, c, **s))
            wanted = outcome(
                lambda c=chat, v=variables: theirs.apply_chat_template(c, chat_template=template, tokenize=False, **v)
            )
            assert made == wanted, (chat, variables)
            assert json.dumps(chat) == before
            kinds.add(made[0])
    assert kinds & {"text", "no template", "refused"}  # not compared by errors of ours and of theirs alone


TEXTS = ["", "Hello  world\n", " é日👩 <s>x</s>", "a<unk>b ab abc", "\u00a0tab\tx"]


def same(made: tokenizer.ModelTokenizer, wanted: Any) -> None:
    assert made.chat_template == wanted.chat_template
    assert made.special_tokens == wanted.special_tokens_map
    theirs: Tokenizer = wanted.backend_tokenizer
    assert made.tokenizer.to_str() == theirs.to_str()
    for text in TEXTS:
        for special in (True, False):
            ids = made.tokenizer.encode(text, add_special_tokens=special).ids
            assert ids == theirs.encode(text, add_special_tokens=special).ids
            assert made.tokenizer.decode(ids) == theirs.decode(ids)


def changed(folder: Path, **fields: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": None},
        {"split_special_tokens": True, "extra_special_tokens": ["ab"]},
        {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]},
    ],
    ids=["plain", "changed by its class", "special tokens as text", "several templates"],
)
def test_tokenizers_are_those_of_transformers(model_folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    changed(folder, **fields)
    same(tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder)))


def test_a_tokenizer_of_another_format(model_folder: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(f"hello world {n} the quick brown fox ab abc" for n in range(200)))
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(model_folder / "config.json", folder)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe", hard_vocab_limit=False
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    same(tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder)))


def test_the_default_model() -> None:
    name = model.DEFAULT_MODEL.replace("/", "--")
    folder = next((f for kind in ("models", "tokenizers") if (f := cache_folder() / kind / name).is_dir()), None)
    if folder is None:
        pytest.skip("it has not been fetched here")
    made, wanted = tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))
    same(made, wanted)
    test_templates_come_out_the_same(wanted, str(made.chat_template))


def test_several_templates(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "ab"}]
    changed(folder, chat_template=templates)
    text, message = TextModel(folder), [Message(role="user", content="x")]
    assert text.decode(text.render_chat(message)) == "a"
    tools = [Tool.model_validate({"function": {"name": "f"}})]
    assert text.decode(text.render_chat(message, tools)) == "ab"


class Spaces:
    """A pre-tokenizer in Python."""

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(lambda _, part: NormalizedString.split(part, " ", "removed"))


def test_what_cannot_be_written_down_is_loaded_here(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    custom = AutoTokenizer.from_pretrained(str(model_folder)).backend_tokenizer
    custom.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Spaces())
    assert tokenizer.as_text(custom) == ""
    head = json.dumps({"chat_template": "t", "special_tokens": {}, "encode_special_tokens": False}).encode()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=head + b"\n"))
    monkeypatch.setattr(tokenizer_files, "read", lambda _: tokenizer.ModelTokenizer(custom, "t", {}))
    made = inspect.unwrap(tokenizer.load)(model_folder)
    assert made.tokenizer is custom
    assert made.chat_template == "t"


def test_a_folder_without_a_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"its tokenizer cannot be loaded: \w+"):
        tokenizer.load(tmp_path)
    assert "Traceback" not in capfd.readouterr().err
