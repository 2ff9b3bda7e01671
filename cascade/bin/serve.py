"""Serve a model: a page with a microphone, OpenAI's realtime and transcription endpoints, sherpa-onnx's WebSocket.

    python -m cascade.bin.serve --exp-dir egs/an4/exp/student        # then open http://127.0.0.1:8080

cascade/server/README.md describes the endpoints and limits. The first line of the log that names a URL says that the
server listens. SIGTERM or Ctrl-C: nobody is let in any more, everyone gets the text of what was heard, the exit code is
0. Only this machine can connect unless --host says otherwise; then think of --api-key-file and --certificate.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values, open_recognizer
from cascade.bin.score_arguments import add_score_arguments
from cascade.config.options import ConfigError
from cascade.search.methods import METHODS, STREAMING_MODES
from cascade.stream.endpoint import EndpointOptions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, or_onnx=True)
    parser.add_argument("--mode", choices=STREAMING_MODES, default="two_pass", help="default two_pass")
    parser.add_argument("--method", choices=METHODS, default="greedy_search")
    add_search_arguments(parser)
    add_score_arguments(parser)
    pause = EndpointOptions().silence_after_speech
    parser.add_argument(
        "--silence-after-speech", type=float, default=pause, metavar="S", help=f"a segment ends after it ({pause:g} s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8080, help="default 8080; 0: any free one")
    parser.add_argument(
        "--max-streams", type=int, metavar="N", help="connections at a time (default: half of what a measurement finds)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of the model (default 1)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line; clients need one of them")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="PEM: serve https, which phones need")
    parser.add_argument("--key", type=Path, metavar="FILE", help="PEM: the certificate's private key")
    parser.add_argument("--idle", type=float, default=60.0, metavar="S", help="end a silent connection after S s (60)")
    parser.add_argument("--max-minutes", type=float, default=120.0, metavar="M", help="of audio, a connection (120)")
    parser.add_argument("--max-upload-mb", type=int, default=64, metavar="MB", help="of a recording (64)")
    arguments = parser.parse_args()
    check_values(arguments, max_streams=1, threads=1, epoch=1, avg=1, max_upload_mb=1)
    if not 0 <= arguments.port < 1 << 16:
        raise ConfigError(f"--port must be 0 to 65535, got {arguments.port}")
    for name in ("idle", "max_minutes"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        from cascade.server.app import Server
        from cascade.server.security import open_certificate, read_api_keys
        from cascade.server.serve import serve
        from cascade.server.worker import Worker
    except ModuleNotFoundError as error:
        raise ImportError(f"the server needs aiohttp ({error}): pip install aiohttp") from error
    endpoint = EndpointOptions(silence_after_speech=arguments.silence_after_speech)
    tls = open_certificate(arguments.certificate, arguments.key)
    keys = read_api_keys(arguments.api_key_file) if arguments.api_key_file else []

    async def run() -> None:
        worker = Worker(
            lambda: open_recognizer(arguments, arguments.mode, endpoint), arguments.max_streams,
            60 * arguments.max_minutes,
        )  # fmt: skip
        server = Server(worker, keys, arguments.idle, arguments.max_upload_mb << 20)
        await serve(server, arguments.host, arguments.port, tls, bool(keys))

    asyncio.run(run())


if __name__ == "__main__":
    run_program(main)
