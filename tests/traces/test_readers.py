"""Every format is read to the same workload, and bad input is named by file and line."""

import gzip
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ares.traces import TraceError, Workload, guess_format, rate_warning, read_trace, synthetic

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,396,109\n"
)
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n'
    '{"timestamp": 2500, "input_length": 396, "output_length": 109, "hash_ids": [0, 1]}\n'
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,374,44,418,x\n6.5,GPT-4,396,109,505,x\n"
)
PLAIN = "arrival_s,input_tokens,output_tokens\n9.5,396,109\n8,374,44\n"
PLAIN_JSON = (
    '{"arrival_s": 8, "input_tokens": "374", "output_tokens": 44.0}\n'
    '{"arrival_s": 9.5, "input_tokens": 396, "output_tokens": 109}\n'
)
BAILIAN = (
    '{"chat_id": 0, "parent_chat_id": -1, "timestamp": 1.0, "input_length": 374, "output_length": 44, "turn": 1}\n'
    '{"chat_id": 1, "parent_chat_id": 0, "timestamp": 2.5, "input_length": 396, "output_length": 109, "turn": 2}\n'
)


@pytest.mark.parametrize(
    ("name", "text"),
    [("azure", AZURE), ("mooncake", MOONCAKE), ("burstgpt", BURST), ("csv", PLAIN), ("bailian", BAILIAN)],
)
def test_formats_agree(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    assert guess_format(path) == name
    same_requests(read_trace(path))


def test_the_beginnings_of_prompts_are_read_where_a_trace_has_them(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(AZURE)
    assert read_trace(path).templates is None
    blocks = ([0, 1, 2], [0], [0, 1, 3], [5, 1])
    row = '{{"timestamp": {time}, "input_length": 9, "output_length": 5, "hash_ids": {blocks}}}\n'
    # Later in the file and earlier in time: the order is that of the arrivals.
    path.write_text("".join(row.format(time=9 - n, blocks=ids) for n, ids in enumerate(blocks)))
    work = read_trace(path)
    assert work.templates is not None
    fourth, third, second, first = work.templates.tolist()
    assert first == third != fourth
    assert second == [first[0], -1]
    assert fourth[1] not in {first[1], -1}
    np.testing.assert_array_equal(work.repeated(6).templates, work.templates[[0, 1, 2, 3, 0, 1]])
    np.testing.assert_array_equal(work.at_rate(2.0).templates, work.templates)


@pytest.mark.parametrize("blocks", ['"0"', "[0, null]", "[[1]]", "7"])
def test_beginnings_that_are_no_numbers_are_refused(tmp_path: Path, blocks: str) -> None:
    path = tmp_path / "trace"
    path.write_text(f'{{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": {blocks}}}\n')
    with pytest.raises(TraceError, match=r"trace:1: hash_ids"):
        read_trace(path)


def same_requests(work: Workload) -> None:
    np.testing.assert_allclose(work.arrival_s, [0.0, 1.5])
    np.testing.assert_array_equal(work.prompt_tokens, [374, 396])
    np.testing.assert_array_equal(work.output_tokens, [44, 109])


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + AZURE,
        "\ufeff" + MOONCAKE,
        AZURE.replace("\n", "\r\n"),
        MOONCAKE.replace("\n", "\r\n\r\n"),
        "\n \n" + PLAIN.replace("\n", "\n\n,,\n"),
        PLAIN.replace(",", ";"),
        AZURE.replace(",", "\t"),
        BURST.replace(",", " , "),
        BURST.replace("ChatGPT", '"a, b"').replace("GPT-4", '"c\nd"'),
        PLAIN.replace("arrival_s,input_tokens", "Arrival_S, INPUT_TOKENS "),
        AZURE.replace("2023-11-16 18:15:46.6805900", "2023-11-16T19:15:46.6805900+01:00").replace("48.18", "48.18"),
        AZURE.replace("0,374", "0Z,374"),
        PLAIN.replace("9.5,", "-0.5,").replace("8,", "-2,"),
        PLAIN_JSON,
        "timestamp,input_length,output_length\n1000,374,44\n2500,396,109",
    ],
)
def test_the_same_requests_in_every_spelling(tmp_path: Path, text: str) -> None:
    for name, data in (("plain", text.encode()), ("packed", gzip.compress(text.encode()))):
        path = tmp_path / name
        path.write_bytes(data)
        same_requests(read_trace(path))


def test_a_pipe_is_opened_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for text in (AZURE, MOONCAKE, MOONCAKE.replace("0]", "0" + ", 1" * 10_000 + "]")):
        writer = threading.Thread(target=path.write_text, args=(text,))
        writer.start()
        same_requests(read_trace(path))
        writer.join()


def test_the_unit_of_times_is_given_by_fields_or_by_the_user(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(BAILIAN)
    assert read_trace(path).notes == ()
    forced = read_trace(path, "mooncake")
    assert forced.arrival_s[-1] == pytest.approx(0.0015)
    assert "fields of Bailian's traces, whose times are seconds" in forced.notes[0]
    path.write_text(MOONCAKE)
    for unit, span in (("s", 1500.0), ("ms", 1.5), ("us", 1.5e-3), ("ns", 1.5e-6)):
        work = read_trace(path, None, unit)
        assert work.arrival_s[-1] == pytest.approx(span)
        # Two requests within so little, or so much, are more likely in another unit.
        assert (rate_warning(work) is None) == (unit == "ms")
    with pytest.raises(TraceError, match="unknown time unit 'h'; known: s, ms, us, ns"):
        read_trace(path, None, "h")
    path.write_text(AZURE)
    with pytest.raises(TraceError, match="times of format azure are dates"):
        read_trace(path, None, "ms")


def test_what_is_not_taken_as_it_stands_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("arrival_s,input_tokens,output_tokens\n3,5,5\n1,0,5\n2,5,0\n4,5,1\n")
    assert read_trace(path).notes == (
        "trace: left out 1 requests that generate nothing",
        "trace: 1 empty prompts count as one token",
        "trace: 1 requests arrive before the one above them; sorted by time",
    )
    path.write_text("arrival_s,input_tokens,output_tokens\n3,5,0\n")
    with pytest.raises(TraceError, match="no request generates anything"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("arrival_s,input_tokens,output_tokens\n", "empty"),
        ("when,what\n1,2\n", r"trace:1: unknown columns what, when"),
        ("arrival_s,input_tokens,output_tokens\n0,5,5\n1,-5,5\n", r"trace:3: negative"),
        ("arrival_s,input_tokens,output_tokens\n0,five,5\n", r"trace:2: .*five"),
        ("arrival_s,input_tokens,output_tokens\n0,nan,5\n", r"trace:2: negative or infinite"),
        ("arrival_s,input_tokens,output_tokens\n0,5\n", r"trace:2: no column output_tokens"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5}\n{oops\n', r"trace:2: not JSON"),
        ('{"timestamp": 0, "input_length": 5}\n', r"trace:1: no column output_length"),
        ('{"timestamp": 0, "input_length": null, "output_length": 5}\n', r"trace:1: no column input_length"),
        ('[{"timestamp": 0, "input_length": 5, "output_length": 5}]\n', r"trace:1: a JSON array: write one object a"),
        ('{"timestamp": 0, "timestamp": 1, "input_length": 5, "output_length": 5}\n', r"timestamp is repeated"),
        ('{"timestamp": true, "input_length": 5, "output_length": 5}\n', r"trace:1: not a number: True"),
        ("arrival_s,input_tokens,output_tokens,Arrival_S\n0,5,5,1\n", r"trace:1: the column arrival_s is repeated"),
        ("arrival_s,input_tokens,output_tokens\n0,1,234,5\n", r"trace:2: 4 fields where the header has 3"),
        ("arrival_s,input_tokens,output_tokens\n0,5.5,5\n", r"trace:2: not whole numbers of tokens"),
        ('arrival_s,input_tokens,output_tokens\n0,5,5\n1,"5,5\n2,5,5\n', r"trace:4: not CSV"),
        ("arrival_s,input_tokens,output_tokens\ninf,5,5\n", r"trace:2: negative or infinite"),
        ("arrival_s,input_tokens,output_tokens\r0,5,5\r", r"carriage returns alone"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nowhere"):
        read_trace(tmp_path / "nowhere.csv")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(TraceError, match="binary"):
        read_trace(binary)
    binary.write_bytes(AZURE.encode("utf-16"))
    with pytest.raises(TraceError, match="binary: is UTF-16: save it as UTF-8"):
        read_trace(binary)


def test_zone_and_plain_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,1,2\n2024-05-10 00:00:00.009930+00:00,1,2\n"
    )
    np.testing.assert_allclose(read_trace(path).arrival_s, [0.0, 0.00993], atol=1e-6)


def test_the_paper_mix_matches_the_paper() -> None:
    work = synthetic("paper", 50_000, seed=0)
    assert np.mean(work.output_tokens < 1000) == pytest.approx(0.292, abs=0.01)
    assert np.mean(work.output_tokens > 30_000) == pytest.approx(0.173, abs=0.01)
    assert work.output_tokens.max() <= 32_000


def test_rate_and_repetition() -> None:
    work = synthetic("chat", 1000, seed=3, rate=2.0)
    assert work.at_rate(7.0).rate == pytest.approx(7.0)
    twice = work.repeated(2500)
    assert len(twice) == 2500
    assert (np.diff(twice.arrival_s) >= 0).all()
    assert twice.rate == pytest.approx(work.rate, rel=0.01)
    np.testing.assert_array_equal(twice.output_tokens[2000:], work.output_tokens[:500])


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown workload 'nope'; known: paper"):
        synthetic("nope", 10, seed=0)
