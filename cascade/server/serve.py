"""The server's life: listen, serve until a signal comes, decode what was heard, end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import ssl
import time

from aiohttp import web

from cascade.config.options import ConfigError
from cascade.server.app import Server

REQUEST_SECONDS = 20.0
"""A connection that has made no whole request by then is cut."""
KEEP_SECONDS = 75.0
"""A connection stays open so long for the next request."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(server: Server, host: str, port: int, tls: ssl.SSLContext | None, has_keys: bool) -> None:
    """Listen on host and port (0: any free one) until SIGTERM or SIGINT.

    Raises:
      ConfigError: the port cannot be had.
      Whatever making the recogniser raises.
    """
    stopped = asyncio.Event()
    runner = web.AppRunner(server.app, access_log=None, handle_signals=False, shutdown_timeout=5.0,
                           keepalive_timeout=KEEP_SECONDS)  # fmt: skip
    await runner.setup()
    cutting = asyncio.create_task(cut_mute_connections(runner, server))
    try:
        recognizer = await server.start()
        for number in (signal.SIGTERM, signal.SIGINT):  # until here they interrupt
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        try:
            await site.start()
        except OSError as error:  # its text has the address and the number of the error before the reason
            reason = str(error).rpartition(": ")[2]
            raise ConfigError(f"--host {host} --port {port} cannot be listened on: {reason}") from error
        port = runner.addresses[0][1]
        scheme = "http" if tls is None else "https"
        logging.info("%s: %s://%s:%d, %d streams at most", recognizer.name, scheme, host, port, server.max_streams)
        if not is_loopback(host):
            if tls is None:
                logging.warning("browsers give a page the microphone over https only: see --certificate")
            if not has_keys:
                logging.warning("whoever can reach %s can use this server: see --api-key-file", host)
        await stopped.wait()
        logging.info("a signal: no new connections, %d streams are decoded to their end", server.num_streams)
        await site.stop()
        await server.drain()
    finally:
        cutting.cancel()
        await runner.cleanup()


async def cut_mute_connections(runner: web.AppRunner, server: Server) -> None:
    """Cut those that never make a request, for which aiohttp waits for ever: each holds one of the process's files."""
    since: dict[object, float] = {}
    while True:
        now, connections = time.monotonic(), set(runner.server.connections)
        server.connections &= connections
        since = {each: since.get(each, now) for each in connections - server.connections}
        for connection, begin in since.items():
            if now - begin > REQUEST_SECONDS and connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(REQUEST_SECONDS / 4)
