"""Flags of the command line and of the file of `--config` are one list, as vLLM reads them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ares.engine import given_flags
from ares.engine.given_flags import FlagFileError, GivenFlag, each, expand, names

FILE = """\
max-model-len: 1024
max_num_seqs: 8
enforce-eager: true
enable-prefix-caching: false
headless: false
lora-modules: [a=/a, b=/b]
cudagraph-capture-sizes: []
compilation-config:
  pass_config: {fuse_norm_quant: true}
kv-cache-memory-bytes: 1G
quantization: null
"""


@pytest.fixture(autouse=True)
def _timestamps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: vLLM imports a package that lets PyYAML read timestamps as text."""
    own = yaml.constructor.SafeConstructor.construct_yaml_timestamp
    monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:timestamp", own)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "flags.yaml"
    path.write_text(FILE)
    return path


def test_a_file_stands_before_the_command_line(file: Path) -> None:
    expected = ["--max-model-len", "1024", "--max_num_seqs", "8", "--enforce-eager", "--no-enable-prefix-caching"]
    expected += ["--lora-modules", "a=/a", "b=/b"]
    expected += ["--compilation-config", '{"pass_config": {"fuse_norm_quant": true}}']
    expected += ["--kv-cache-memory-bytes", "1G", "--quantization", "None"]
    given = ["-tp", "2", "--max-model-len", "512"]
    for words in (["--config", str(file)], [f"--config={file}"]):
        assert expand([*given[:2], *words, *given[2:]]) == [*expected, *given]
    assert expand(given) == given


@pytest.fixture(scope="module")
def parser() -> Any:
    pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
    from ares.engine import vllm_api as vllm

    return vllm.make_arg_parser(vllm.FlexibleArgumentParser())


def test_vllm_reads_the_same(parser: Any, file: Path) -> None:
    """Its own reading of the file, by its own precedence."""
    given = ["-tp", "2", "--config", str(file), "--max-model-len", "512", "--no-enforce-eager"]
    read, expected = parser.parse_args(expand(given)), parser.parse_args(given)
    assert read.max_model_len == 512
    assert (read.max_num_seqs, read.enable_prefix_caching, read.enforce_eager) == (8, False, False)
    read.config = expected.config
    assert vars(read).keys() == vars(expected).keys()
    different = [name for name, value in vars(read).items() if repr(value) != repr(getattr(expected, name))]
    assert different == []


def test_a_switch_is_turned_off_as_vllm_has_it(parser: Any, tmp_path: Path) -> None:
    """Each switch of its parser, those without `--no-NAME` among them; vLLM itself drops what it cannot turn off."""
    switches = [name for name, value in vars(parser.parse_args([])).items() if isinstance(value, bool)]
    path = tmp_path / "all.yaml"
    path.write_text("".join(f"{name}: false\n" for name in switches))
    read = parser.parse_args(expand(["--config", str(path)]))
    assert [name for name in switches if getattr(read, name)] == []
    assert len(switches) > 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should be lines such as `max-model-len: 4096`"),
        ("- seed\n", "should be lines such as"),
        ("seed: [\n", "should be lines such as .*flow node"),
        ("1: 2\n", "should be lines such as"),
        ("seed: !!timestamp now\n", "should be lines such as"),
        ("model: some/model\n", "model: leave it out, and give --model to the `ares` command"),
        ("port: 8000\n", "port: leave it out"),
        ("config: other.yaml\n", "config: leave it out"),
        ("seed: 1\nseed: 2\n", "line 2: seed is given twice"),
        ("max-model-len: 1\nmax_model_len: 2\n", "max_model_len is given twice"),
        ("hf-overrides: {since: 2026-01-01}\n", "hf-overrides: .*date is not JSON"),
        ("hf-overrides: {2026-01-01: 1}\n", "hf-overrides: .*not datetime.date"),
        ("hf-overrides: &all {all: *all}\n", r"line 1: \*all stands for what it is a part of"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "flags.yml"
    path.write_text(text)
    with pytest.raises(FlagFileError, match=f"--config {path}: {message}"):
        expand(["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config: expected a YAML file"),
        (["--config="], "--config: expected a YAML file"),
        (["--config", "--seed", "1"], "--config: expected a YAML file"),
        (["--config", "flags.json"], "flags.json: expected a file whose name ends in .yaml or .yml"),
        (["--config", "no/such.yaml"], "no/such.yaml: cannot be read: No such file"),
        (["--config", "a.yaml", "--config=b.yaml"], "is given 2 times"),
    ],
)
def test_a_file_that_is_not_there(words: list[str], message: str) -> None:
    with pytest.raises(FlagFileError, match=message):
        expand(words)


def test_what_is_given() -> None:
    words = ["--max_num_seqs=8", "--no-enforce-eager", "-tp", "2", "--compilation_config.mode", "3", "-O3", "-O", "1"]
    assert list(each(words)) == [
        GivenFlag("max-num-seqs", "8"),
        GivenFlag("enforce-eager", "-tp", on=False),
        GivenFlag("tensor-parallel-size", "2"),
        GivenFlag("compilation-config", "3"),
        GivenFlag("optimization-level", "3"),
        GivenFlag("optimization-level", "1"),
    ]
    assert names(["-cc.mode=3", "value", "-q", "fp8"]) == {"compilation-config", "quantization"}


def test_short_names_are_vllms(parser: Any) -> None:
    values = {"-ac": "{}", "-cc": "{}", "-dc": "{}", "-sc": "{}", "-q": "fp8", "-dpb": "ray", "-dpa": "host"}
    defaults = vars(parser.parse_args([]))
    shorts = ["-ac", "-asc", "-cc", "-dc", "-dcp", "-dp", "-dpa", "-dpb", "-dpe", "-dph", "-dpl", "-dpm", "-dpn"]
    for short in [*shorts, "-dpp", "-dpr", "-ep", "-n", "-pcp", "-pp", "-q", "-r", "-sc", "-tp"]:
        (name,) = given_flags.names([short])
        value = [] if isinstance(defaults[name.replace("-", "_")], bool) else [values.get(short, "7")]
        long, brief = parser.parse_args([f"--{name}", *value]), parser.parse_args([short, *value])
        assert repr(vars(long)) == repr(vars(brief)), short
        assert repr(vars(brief)) != repr(defaults) or short in ("-ac", "-cc"), short
