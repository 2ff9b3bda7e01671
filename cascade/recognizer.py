"""From a folder to text, in a few lines:

    recognizer = Recognizer("egs/an4/exp/student")      # a model directory, or a folder that export_onnx wrote
    stream = recognizer.stream()
    for samples in packets:                             # int16 or float32, of any size, at any one rate
        print(stream.accept(samples, 48000).text)
    print(stream.finish().text)

Many streams share their computation: `push` what each has heard, `advance` once, read every `partial`. What comes out
depends on a stream's audio alone, not on its packets and not on other streams. A recogniser and its streams belong to
one thread, the one that made it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cascade.config.options import ConfigError
from cascade.device import CHOICES
from cascade.provenance import processor
from cascade.search.hotwords import DEFAULT_SCALE, encode_phrases
from cascade.search.methods import DecodingOptions, build_scorers, default_left_context_ms
from cascade.stream.batch import StreamBatch
from cascade.stream.decoder import StreamingDecoder
from cascade.stream.endpoint import EndpointOptions
from cascade.threads import limit_threads

EXPORTED = "export.json"
"""The file by which a folder is known as an exported one."""
PAUSES = EndpointOptions()
log = logging.getLogger(__name__)


class Recognizer:
    """A trained model, ready to hear.

    Args:
      folder: what training called --exp-dir, or what export_onnx wrote.
      endpoint: rules that cut streams into segments; None: a stream is one segment, and memory grows with it.
      device: auto | cpu | cuda, for a model directory; exported files run on the CPU.
      threads: CPU threads of PyTorch and numpy, None: as many as there are cores; exported graphs run on one.
      int8: of exported files, those in 8 bits where there are some (export_onnx --int8).
      epoch, average: use the average of so many epochs up to this one; None: the final model.
      options: how to decode, by the names of DecodingOptions: mode (default two_pass), method, beam, chunk_ms,
        look_ahead_ms, left_context_ms, blank_penalty, ngram, lm_scale, lodr, lodr_scale, rescore, hotwords,
        hotword_scale. Exported files have their contexts built in.
    Raises:
      FileNotFoundError, ValueError: the folder is not one of these, or damaged.
      ConfigError: an option that does not exist or does not fit.
      ImportError: what runs the folder is not installed: PyTorch for a model directory, onnxruntime for exported files.
    """

    def __init__(
        self, folder: str | Path, *, endpoint: EndpointOptions | None = PAUSES, device: str = "auto",
        threads: int | None = None, int8: bool = False, epoch: int | None = None, average: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        folder = Path(folder)
        unknown = sorted(set(options) - set(DecodingOptions.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"a Recognizer has no option {', '.join(unknown)}")
        if not isinstance(options.get("hotwords") or "", (str, Path)):
            raise ConfigError("hotwords is the name of a file; phrases go to stream(hotwords=...)")
        options = {"mode": "two_pass", **{name: value for name, value in options.items() if value is not None}}
        if device not in CHOICES:
            raise ConfigError(f"device must be one of {' | '.join(CHOICES)}, got {device!r}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        if average != 1 and epoch is None:
            raise ConfigError(f"average={average} needs an epoch")
        DecodingOptions(**options)  # a wrong option is said before the model is read
        if (folder / EXPORTED).is_file():
            if device == "cuda":
                raise ConfigError(
                    "--device cuda cannot be: onnxruntime runs exported files on the CPU; take --device cpu or leave "
                    "it out"
                )
            if epoch is not None:
                raise ConfigError(f"--epoch chooses weights of --exp-dir: give it to export_onnx, not with {folder}")
            engine, config, tokenizer, options = _open_exported(folder, options, threads, int8)
        else:
            if int8:
                raise ConfigError(f"int8 needs exported files (export_onnx --int8), {folder} is a model directory")
            engine, config, tokenizer, options = _open_model(folder, options, device, threads, epoch, average)
        options = DecodingOptions.for_model(config, **options)
        self._batch = StreamBatch(engine, tokenizer, options, endpoint, build_scorers(options, tokenizer))
        self._new_decoder = partial(StreamingDecoder, engine, config, tokenizer, batch=self._batch)
        self.name = folder.resolve().name
        self.sampling_rate = config.features.sampling_rate
        """Hz of the model; audio of other rates is resampled to it."""
        self.chunk_seconds = self._batch.options.chunk_ms / 1000
        """The text can change once in so much audio."""
        self.endpoint = endpoint

    def stream(self, hotwords: Sequence[str] = (), *, keep_segments: bool = True) -> StreamingDecoder:
        """A new stream, which has heard nothing.

        Args:
          hotwords: phrases that it prefers, besides those that all streams have; each may end with its own boost,
            `new york :2.5`.
          keep_segments: False for endless streams: a segment is handed out once, and forgotten.

        Raises:
          ValueError: a phrase that the model's tokens cannot say.
        """
        return self._new_decoder(keep_segments=keep_segments, hotwords=hotwords)

    def check_hotwords(self, hotwords: Sequence[str]) -> None:
        """Raise the ValueError that `stream` would raise; any thread may ask."""
        encode_phrases(self._batch.tokenizer, hotwords, DEFAULT_SCALE)

    def advance(self) -> None:
        """Decode what all streams have heard, as far as their chunks are complete."""
        self._batch.run()


def _open_model(
    folder: Path, options: dict[str, Any], device: str, threads: int | None, epoch: int | None, average: int
) -> tuple[Any, ...]:
    """PyTorch's model: its engine, config and tokenizer, and the options."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such model directory: {folder}")
    try:
        import torch

        from cascade.checkpoint import load_model
        from cascade.device import choose_device, describe_device
        from cascade.models.torch_engine import TorchEngine
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{folder} is a model directory (it has no {EXPORTED}), which needs the package {error.name}: run pip "
            "install '.[train]' in the repository's folder, or open its export (cascade.bin.export_onnx)"
        ) from error
    if threads is not None:
        limit_threads(threads)
    torch.set_flush_denormal(True)  # before the first parallel region: its threads inherit it
    chosen = choose_device(device)
    log.info("device: %s", describe_device(chosen))
    model, config, tokenizer = load_model(folder, epoch, average)
    model.to(chosen)
    if options.get("left_context_ms") is None:
        chunk_ms = options.get("chunk_ms", DecodingOptions.chunk_ms)
        options = {**options, "left_context_ms": default_left_context_ms(config, chunk_ms)}
    return TorchEngine(model), config, tokenizer, options


def _open_exported(folder: Path, options: dict[str, Any], threads: int | None, int8: bool) -> tuple[Any, ...]:
    """Exported files, by onnxruntime: as `_open_model`."""
    from cascade.export.onnx_engine import OnnxEngine

    if threads is not None:
        limit_threads(threads)
    log.info("device: cpu, %s", processor())
    engine = OnnxEngine(folder, int8)
    for name, built_in in engine.times.items():
        if options.get(name, built_in) != built_in:
            raise ConfigError(
                f"--{name.replace('_', '-')} {options[name]} needs other files: {folder} was exported with {built_in}, "
                "a constant of its graphs"
            )
    return engine, engine.config, engine.tokenizer, {**options, **engine.times}
