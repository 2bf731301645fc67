"""Chooses the URL of a cluster's dashboard, and refuses to send secrets to it in clear text."""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed lacks it

from distft.config import redact
from distft.errors import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in the order in which Ray's client reads them


def choose_address(given: str | None, environ: Mapping[str, str]) -> str:
    """The dashboard's URL: `given`, else Ray's environment variables, else this machine's default.

    Raises `ConfigError` for anything but a URL: Ray would look up any other address in the cluster, over a
    connection of its own that carries the token as well.
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
    """Raise `ConfigError` if Ray's client would send a token or a password over a network in clear text."""
    parts = urlsplit(address)
    if parts.scheme != "http" or parts.hostname is None:
        return
    # Ray's client sends a token in this mode only, whether from a variable or a file.
    secret = "the cluster's token" if environ.get("RAY_AUTH_MODE", "").lower() == "token" else ""
    if parts.username is not None:
        secret = secret or "the login in the address"
    proxy = _proxy_host(parts.hostname, environ)
    if not secret or (proxy is None and is_loopback(parts.hostname)) or (proxy and is_loopback(proxy)):
        return
    port = parts.port or 80
    receiver = parts.hostname if proxy is None else f"the proxy {proxy}"
    remedy = (
        f"Use a tunnel (ssh -N -L 8265:localhost:{port} {parts.hostname}, then --address {DEFAULT_ADDRESS}), "
        if proxy is None
        else f"Add {parts.hostname} to NO_PROXY, "
    )
    raise ConfigError(
        f"{redact(address)}: {secret} would go to {receiver} in clear text, which others on the network can "
        f"read. {remedy}use https, or send it all the same with --allow-clear-text-token."
    )


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine; looks nothing up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _proxy_host(host: str, environ: Mapping[str, str]) -> str | None:
    """The proxy for plain HTTP to `host`, by the variables that HTTP clients follow; None without one."""
    lower = {name.lower(): value for name, value in sorted(environ.items())}  # lower case names win
    proxy = lower.get("http_proxy") or lower.get("all_proxy")
    bypassed: Mapping[str, str] = {"no": lower.get("no_proxy", "")}
    if not proxy or proxy_bypass_environment(host, bypassed):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}").hostname
