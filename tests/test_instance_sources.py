import pytest

from ares import extras
from ares.config import load
from ares.instance_sources import canonical, check_url, http_url, parse_source


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("file:/etc/ares/instances.yaml", {"path": "/etc/ares/instances.yaml"}),
        ("file:C: d.yaml", {"path": "C: d.yaml"}),
        ("dns:decode.serving.svc:8100", {"host": "decode.serving.svc", "port": "8100"}),
        ("api", {}),
    ],
)
def test_a_source_is_taken_apart(text: str, parts: dict[str, str]) -> None:
    found = parse_source(f" {text}\n")
    assert (found.text, found.kind, found.parts) == (text, text.partition(":")[0], parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("srv:_http._tcp.decode.serving", {"name": "_http._tcp.decode.serving"}),
        ("kubernetes:serving/decode", {"namespace": "serving", "service": "decode"}),
        ("kubernetes:serving/decode:http", {"namespace": "serving", "service": "decode", "port": "http"}),
        (
            "pods:serving/app=ares,llm-d.ai/role=decode:8100",
            {"namespace": "serving", "labels": "app=ares,llm-d.ai/role=decode", "port": "8100"},
        ),
    ],
)
def test_a_source_that_needs_a_package_says_so(
    text: str, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert parse_source(text).parts == parts
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"^'{text}': (dns|kubernetes) is missing: .*\[discovery\]"):
        parse_source(text)
    assert {extras.EXTRAS[package] for package in ("dns", "kubernetes")} == {"discovery"}
    with pytest.raises(ValueError, match=r"^'ray:chat': ray is missing: .*\[ray\]"):
        parse_source("ray:chat")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no source ''; known: file:PATH, dns:HOST:PORT"),
        ("etcd:here", "no source 'etcd'"),
        ("file:", "expected file:PATH"),
        ("file", "expected file:PATH"),
        ("dns:decode", "expected dns:HOST:PORT"),
        ("dns:http://decode:8100", "expected dns:HOST:PORT"),
        ("dns:decode:0", "0 is no port"),
        ("dns:decode:65536", "65536 is no port"),
        ("kubernetes:decode", "expected kubernetes:NAMESPACE/SERVICE"),
        ("kubernetes:a/b/../c", "expected kubernetes"),
        ("pods:serving/app:8100", "expected pods:NAMESPACE/LABEL=VALUE"),
        ("pods:serving/app=ares", "expected pods"),
        ("ray:", "expected ray:APPLICATION"),
        ("api:there", "expected api"),
    ],
)
def test_a_wrong_source_is_refused_with_the_form(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_source(text)


def test_a_gateway_may_begin_without_instances_where_a_source_names_them() -> None:
    config = load(model="m", service_discovery=["api", "file:a.yaml", "api"])
    assert (config.workers, config.service_discovery) == ([], ["api", "file:a.yaml"])


@pytest.mark.parametrize(
    "url",
    ["", "decode:8100", "ftp://a", "http://", "http://[", "http://a:0", "http://a:x", "http://a b"],
)
def test_what_is_no_url_of_an_instance(url: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of an instance"):
        check_url(url)


def test_what_cannot_be_printed_is_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"^the URL of an instance has a character that cannot be printed$"):
        check_url("http://me:secret@a\ud800:1")


def test_spellings_of_one_url() -> None:
    assert len({canonical(url) for url in ("http://a", "http://A:80/", "HTTP://a")}) == 1
    assert canonical("https://a:443/x/") == "https://a/x"
    assert canonical(http_url("fd00::1", 8100)) == "http://[fd00::1]:8100"
    assert canonical("http://a:8100") != canonical("http://a:8101")
