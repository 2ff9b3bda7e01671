"""The server's life: listen, serve until a signal comes, decode what was heard, end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import ssl

from aiohttp import web

from cascade.server.app import Server


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(server: Server, host: str, port: int, tls: ssl.SSLContext | None, has_keys: bool) -> None:
    """Listen on host and port (0: any free one) until SIGTERM or SIGINT.

    Raises:
      OSError: the port cannot be had.
      Whatever making the recogniser raises.
    """
    stopped = asyncio.Event()
    runner = web.AppRunner(server.app, access_log=None, handle_signals=False, shutdown_timeout=5.0)
    await runner.setup()
    try:
        recognizer = await server.start()
        for number in (signal.SIGTERM, signal.SIGINT):  # until here they interrupt
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        await site.start()
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
        await runner.cleanup()
