"""Where a cluster takes jobs, and whether what is secret would go there in clear text. No network."""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed lacks it

from distft.config import redact
from distft.errors import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in the order in which Ray's client reads them


def choose_address(given: str | None, environ: Mapping[str, str]) -> str:
    """The dashboard's URL: `given`, what Ray's variables say, or this machine's usual one.

    Raises `ConfigError` for what is no URL: Ray would look such an address up in the cluster, over a
    connection of its own that carries the token, too.
    """
    sources = {"--address": given, **{name: environ.get(name) for name in ADDRESS_VARIABLES}}
    source, address = next(
        ((name, value) for name, value in sources.items() if value), ("--address", DEFAULT_ADDRESS)
    )
    if urlsplit(address).scheme not in {"http", "https"} or not urlsplit(address).hostname:
        raise ConfigError(
            f"{source}={redact(address)} is not the URL of a cluster's dashboard, such as {DEFAULT_ADDRESS}: "
            "give it with --address."
        )
    return address.rstrip("/")


def check_clear_text(address: str, environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` where Ray's client would send a token, or a login, readable over a network."""
    parts = urlsplit(address)
    if parts.scheme != "http" or parts.hostname is None:
        return
    # Ray's client sends a token in this mode only, wherever the token comes from.
    secret = "the cluster's token" if environ.get("RAY_AUTH_MODE", "").lower() == "token" else ""
    if parts.username is not None:
        secret = secret or "the login in the address"
    proxy = _proxy_host(parts.hostname, environ)
    if not secret or (proxy is None and is_loopback(parts.hostname)) or (proxy and is_loopback(proxy)):
        return
    port = parts.port or 80
    way = f"to {parts.hostname}" if proxy is None else f"to the proxy {proxy}"
    remedy = (
        f"Use a tunnel (ssh -N -L 8265:localhost:{port} {parts.hostname}, then --address {DEFAULT_ADDRESS}), "
        if proxy is None
        else f"Add {parts.hostname} to NO_PROXY, "
    )
    raise ConfigError(
        f"{redact(address)}: {secret} would go {way} in clear text, for everybody on the way to read. "
        f"{remedy}use https, or send it all the same with --allow-clear-text-token."
    )


def is_loopback(host: str) -> bool:
    """Whether what is sent to `host` stays on this machine, as far as its name tells."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _proxy_host(host: str, environ: Mapping[str, str]) -> str | None:
    """Where plain HTTP for `host` goes first, by the variables that HTTP clients follow."""
    lower = {name.lower(): value for name, value in sorted(environ.items())}  # the small one wins
    proxy = lower.get("http_proxy") or lower.get("all_proxy")
    bypassed: Mapping[str, str] = {"no": lower.get("no_proxy", "")}
    if not proxy or proxy_bypass_environment(host, bypassed):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}").hostname
