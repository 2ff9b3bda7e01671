"""Who may connect, and what every answer says to browsers.

There are no cookies and no sessions that outlive a connection, so another site's page could not act as its visitor here
nor read anything of theirs; but it could use up a server on the visitor's own machine. Hence requests of pages from
elsewhere are refused by their Origin, which browsers always send with a WebSocket or a POST and other clients do not.
"""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from cascade.config.options import ConfigError

KEY_PROTOCOL = "openai-insecure-api-key."
"""Browsers cannot set a WebSocket's headers: OpenAI's clients there send the key as a subprotocol of this name."""
OPEN_PATHS = {"/health", "/ready"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Server": "cascade",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_response(
    status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


def read_api_keys(path: Path) -> list[bytes]:
    """The keys in a file, one a line.

    Raises:
      FileNotFoundError, ConfigError: no file, no key in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--api-key-file {path} not found")
    keys = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key: write one a line")
    return keys


def open_certificate(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS with these PEM files, None without.

    Raises:
      ConfigError: one without the other, or files that do not fit.
    """
    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key belong together: give both or neither")
    if certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--certificate {certificate} and --key {key} cannot be used: {error}") from error
    return context


def guard(keys: list[bytes], public_paths: set[str]) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """The middleware through which every request goes.

    Args:
      keys: one of them is needed, but for the page and the probes; empty: none is.
      public_paths: of the page's files.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        upgrade = request.headers.get("Upgrade", "").lower() == "websocket"
        origin = request.headers.get("Origin")
        if origin is not None and (upgrade or request.method == "POST") and _host(origin) != request.host:
            return error_response(403, "pages of other origins may not connect", "forbidden_origin")
        is_public = request.method in ("GET", "HEAD") and request.path in OPEN_PATHS | public_paths and not upgrade
        if keys and not is_public and not _knows_key(request, keys):
            message, headers = "an API key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            return error_response(401, message, "invalid_api_key", headers=headers)
        return await handler(request)

    return check


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # an IPv6 address without its end
        return None


def _knows_key(request: web.Request, keys: list[bytes]) -> bool:
    """Comparisons take the same time whatever is wrong with a key."""
    offered = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
    for protocol in request.headers.get("Sec-WebSocket-Protocol", "").split(","):
        if protocol.strip().startswith(KEY_PROTOCOL):
            offered = protocol.strip().removeprefix(KEY_PROTOCOL)
    data = offered.encode("utf-8", "surrogateescape")
    return any([hmac.compare_digest(data, key) for key in keys])  # a list: all are compared
