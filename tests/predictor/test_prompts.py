"""Prompt files: every shape that is documented is read whole, and what is not is said or refused by name."""

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ares.predictor import prompts
from ares.predictor.errors import PredictorError


def read(folder: Path, name: str, content: str | bytes | list[Any]) -> tuple[list[str], list[str]]:
    """Return the texts that a file of this content holds, in some order that is sorted, and the notes."""
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    notes: list[str] = []
    return sorted(prompt.text for prompt in prompts.read([file], note=notes.append)), notes


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_lines_end_at_newlines_alone(tmp_path: Path, separator: str) -> None:
    texts = [f"first{separator}second", f"{separator}page{separator}"]
    assert read(tmp_path, "p.txt", "\n".join(texts)) == (sorted(texts), [])
    rows = "".join(f'{{"prompt": {json.dumps(text, ensure_ascii=False)}}}\n' for text in texts)
    assert read(tmp_path, "p.jsonl", rows) == (sorted(texts), [])


def test_marks_and_carriage_returns_are_no_part_of_a_text(tmp_path: Path) -> None:
    assert read(tmp_path, "p.txt", "\ufeffhello\r\n\r\n  you\t\r\n") == (["hello", "you"], [])
    assert read(tmp_path, "p.jsonl", '\ufeff{"prompt": "hello"}\r\n') == (["hello"], [])


@pytest.mark.parametrize("name", ["P.JSONL", "p.Json", "p.ndjson", "p", "fd63", "p.data", "p.JSONL.GZ", "p.gz"])
def test_json_is_known_by_any_spelling_of_its_suffix_or_by_its_first_line(tmp_path: Path, name: str) -> None:
    content = b'\n{"prompt": "hello"}\n{"prompt": "you"}\n'
    for data in (content, gzip.compress(content)):
        assert read(tmp_path, name, data) == (["hello", "you"], [])
    with pytest.raises(PredictorError, match=":2: not JSON"):
        read(tmp_path, name, b'{"prompt": "hello"}\n{oops\n')


def test_text_that_looks_like_json_is_said(tmp_path: Path) -> None:
    assert read(tmp_path, "p.list", "[INST] hello\n{name} you\n") == (["[INST] hello", "{name} you"], [])
    texts, notes = read(tmp_path, "p.txt", '{"prompt": "hello"}\n')
    assert texts == ['{"prompt": "hello"}']
    assert "to read their fields name the file .jsonl" in notes[0]


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "63"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "hello"}\n',))
    writer.start()
    assert [prompt.text for prompt in prompts.read([pipe])] == ["hello"]
    writer.join()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": None, "question": "Is it cold?"}, "Is it cold?"),
        ({"prompt": " ", "question": "", "instruction": [], "text": "Is it cold?"}, "Is it cold?"),
        ({"instruction": "Translate:", "input": "Good morning"}, "Translate:\n\nGood morning"),
        ({"instruction": "Translate:", "input": "", "context": None}, "Translate:"),
        ({"instruction": "Summarise.", "context": "It was cold."}, "Summarise.\n\nIt was cold."),
        ({"question": "Who?", "context": "It was me."}, "Who?\n\nIt was me."),
        ({"turns": ["First."]}, "First."),
        ({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}, "Hello"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]}, "ab"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "Hello"}]}, "Hello"),
        ({"conversation": [{"role": "user", "content": "Hello"}]}, "Hello"),
        ({"prompt": [{"role": "user", "content": "Hello"}]}, "Hello"),
    ],
)
def test_shapes_of_the_common_data_sets(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    assert read(tmp_path, "p.jsonl", [row]) == ([text], [])
    # As one array, on one line or on many.
    for indent in (None, 2):
        assert read(tmp_path, "p.json", json.dumps([row], indent=indent)) == ([text], [])


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate:", "input": "a", "output": "b", "id": 1},
        {"instruction": "Translate:", "input": "c", "output": ""},
        {"instruction": "Translate:", "input": "a"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
        {"conversations": []},
        {"turns": ["First.", "Second.", "Third."]},
    ]
    texts, notes = read(tmp_path, "p.jsonl", rows)
    assert texts == ["First.", "Hello", "Translate:\n\na", "Translate:\n\nc"]
    unread = "`output` (1), messages of the system (1), later messages of the user (1)"
    assert [note.replace(f"{tmp_path}/", "") for note in notes] == [
        f"p.jsonl: not read: {unread}, conversations without a message of a user (2)",
        "1 of 5 prompts are duplicates, and count once",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", "", "no prompts"),
        ("p.jsonl", "{", "p.jsonl:1: not JSON"),
        ("p.json", "{\n\"prompt\": \"a\"\n}", "write one object a line, or one array of them"),
        ("p.jsonl", '{"no": 1}', "p.jsonl:1: no prompt; expected a text in prompt, question"),
        ("p.jsonl", '{"prompt": 5, "text": "a"}', "`prompt` is not a text"),
        ("p.jsonl", '{"prompt": ["a", "b"]}', "`prompt` is not a text"),
        ("p.jsonl", '{"instruction": "a", "input": ["b"]}', "`input`, which belongs to `instruction`, is not text"),
        ("p.jsonl", '{"question": "a", "context": {"b": 1}}', "`context`, which belongs to `question`, is not text"),
        ("p.jsonl", '{"conversation": "Human: hello"}', "`conversation` is not a list of messages"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "other than text"),
        ("p.jsonl", '{"messages": [5]}', "a turn is neither a text nor an object"),
        ("p.jsonl", '{"messages": []}', "no prompts in it"),
        ("p.jsonl", '{"prompt": "a"}\n"b"\n', "p.jsonl:2: no prompt: not a JSON object"),
        ("p.json", '[{"prompt": "a"}, "b"]', "p.json: entry 2: no prompt: not a JSON object"),
        ("p.csv", "prompt\na\n", "tables are not read"),
        ("p.txt", "a".encode("utf-16"), "is UTF-16"),
        ("p.jsonl", b"\x28\xb5\x2f\xfd\x00", "is compressed with zstd"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(PredictorError, match=name.replace(".", r"\.")) as caught:
        read(tmp_path, name, content)
    assert said in str(caught.value)


def test_behind_a_system_prompt_a_prompt_is_another_one() -> None:
    plain = prompts.Prompt.of("How many?")
    first, second = plain.behind("Be brief."), plain.behind("Explain.")
    assert plain.behind(None) == plain
    assert len({plain.id, first.id, second.id}) == 3
    assert plain.text == first.text == second.text
    assert first == plain.behind("Be brief.")
