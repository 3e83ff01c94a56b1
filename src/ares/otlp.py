"""The URL of a collector of OpenTelemetry (OTLP over HTTP)."""

from urllib.parse import urlsplit

TRACES_PATH = "/v1/traces"


def traces_url(url: str) -> str:
    """Return the URL that spans are sent to; one without a path gets the path of OTLP.

    Raises
    ------
    ValueError
        It is no URL of HTTP.
    """
    url = url.strip()
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a host such as "[", or a port that is no number
        sound = False
    if not sound or not url.isprintable() or " " in url:
        raise ValueError(
            f"{url!r} is no collector that takes OTLP over HTTP: give a URL such as http://127.0.0.1:4318{TRACES_PATH}"
        )
    return parts._replace(path=TRACES_PATH).geturl() if parts.path in ("", "/") else url
