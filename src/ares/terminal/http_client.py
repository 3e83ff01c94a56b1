"""HTTP requests of commands: directly to this machine, to other hosts through the proxy that the environment names."""

import functools
import http.client
import ipaddress
import ssl
import urllib.request
from urllib.parse import urlsplit


class ProxyError(OSError):
    """The proxy that the variables name cannot be used; the message says what to do."""


def open_direct(url: str, timeout: float, body: bytes | None = None) -> http.client.HTTPResponse:
    """Open the URL of a process that we have started ourselves, without a proxy.

    Its certificate is for the name that clients use, and is not checked here.

    Parameters
    ----------
    timeout
        Seconds.
    body
        What to post, if anything.

    Raises
    ------
    OSError
        It does not answer; as urllib.error.HTTPError, it answers with an error.
    """
    return _own_processes().open(urllib.request.Request(url, body), timeout=timeout)  # type: ignore[no-any-return] # noqa: S310 - our own address


def open_url(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    """Open a URL, through its proxy by `proxy_of`.

    Raises
    ------
    ProxyError
        Its proxy speaks SOCKS.
    OSError
        It does not answer; as urllib.error.HTTPError, it answers with an error.
    """
    proxy = proxy_of(request.full_url)
    if proxy is not None and proxy.startswith("socks"):
        raise ProxyError("the proxy variables name a SOCKS proxy, which ares cannot use")
    return _open(request, timeout, proxy)


def proxy_of(url: str) -> str | None:
    """Return the proxy of a URL: none for loopback, else by http_proxy, https_proxy, all_proxy and no_proxy."""
    return None if _is_loopback(urlsplit(url).hostname or "") else proxy_by_variables(url)


def proxy_by_variables(url: str) -> str | None:
    """Return the proxy that the variables name for a URL; most clients use it for loopback as well."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if urllib.request.proxy_bypass(f"{host}:{parts.port}" if parts.port is not None else host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def _open(request: urllib.request.Request, timeout: float, proxy: str | None) -> http.client.HTTPResponse:
    reply: http.client.HTTPResponse = _opener(proxy).open(request, timeout=timeout)
    return reply


@functools.cache
def _own_processes() -> urllib.request.OpenerDirector:
    unchecked = ssl.create_default_context()
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked))


@functools.cache
def _opener(proxy: str | None) -> urllib.request.OpenerDirector:
    proxies = {"http": proxy, "https": proxy} if proxy is not None else {}
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))


def _is_loopback(host: str) -> bool:
    if host.removesuffix(".").rpartition(".")[2] == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified  # 0.0.0.0 and :: are this machine as well
