"""Time and size of the runtimes: PyTorch, ours on the exported files, sherpa-onnx; float32 and int8, one thread.

Every row is one stream of the first pass, chunk by chunk, in a fresh process; with --rounds the rows are measured in
turn several times, and the round with the smallest median counts (a busy machine only ever adds time). Models are
directories (--exp-dir) or random weights of configs (--config, repeated), whose blank is then made so likely that about
2.5 symbols a second are said, by every runtime alike. Each hears the same noise.

chunk_compute_ms_* and chunk_cpu_ms_p50 (processor time) are those of the calls that decode a chunk: encoder and greedy
search. rtf is all compute, features too, over the audio. process_memory_mb is the peak resident set, peak_memory_mb
what of it lies above the imported libraries; MB = 10^6 bytes. size_bytes are the files that the first pass needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RATE, CHUNK_MS = 16000, 320
ENGINES = ("torch", "onnx", "sherpa-onnx")
PRECISIONS = ("float32", "int8")
_WARM_UP = 10


def noise(seconds: float) -> np.ndarray:
    """(num_samples,) int16 noise of changing loudness."""
    rng = np.random.default_rng(1)
    loudness = np.repeat(rng.uniform(50, 5000, int(seconds * 10) + 1), RATE // 10)[: int(seconds * RATE)]
    return (loudness * rng.standard_normal(len(loudness))).clip(-32768, 32767).astype(np.int16)


def make_model(words: list[str], folder: Path) -> None:
    """A model directory of a config's random weights; its tokens are words, so that every runtime counts the same."""
    from cascade.config.load import load_config
    from cascade.config.options import ConfigError
    from tools.random_model import make_random_model

    files, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    config = load_config(files, [*overrides, "tokens.kind=word"])
    if config.features.sampling_rate != RATE:
        raise ConfigError(f"features.sampling_rate must be {RATE} here, got {config.features.sampling_rate}")
    make_random_model(config, folder, noise(20.0))


def our_stream(folder: Path, engine: str, int8: bool) -> tuple[Callable[[np.ndarray], None], Callable[[], bool], Any]:
    """Functions that hear samples, and decode one chunk if there is one; and one that counts the symbols."""
    from cascade.recognizer import Recognizer
    from cascade.stream.endpoint import EndpointOptions

    options = {"int8": int8} if engine == "onnx" else {"device": "cpu", "chunk_ms": CHUNK_MS}
    endpoint = EndpointOptions(silence_from_start=1e6, silence_after_speech=1e6)
    recognizer = Recognizer(folder, mode="streaming", endpoint=endpoint, threads=1, **options)
    stream, words = recognizer.stream(keep_segments=False), [0, 0]

    def hear(samples: np.ndarray) -> None:
        stream.push(samples, RATE)

    def decode() -> bool:
        before = partial()
        recognizer.advance()
        return partial() != before

    def partial() -> float:
        shown = stream.partial()
        words[0] += sum(len(segment.words) for segment in shown.segments)
        words[1] = len(shown.words)
        return shown.decoded

    return hear, decode, lambda: sum(words)


def sherpa_stream(folder: Path, int8: bool) -> tuple[Callable[[np.ndarray], None], Callable[[], bool], Any]:
    import sherpa_onnx

    suffix = ".int8.onnx" if int8 else ".onnx"
    recogniser = sherpa_onnx.OnlineRecognizer.from_transducer(
        encoder=str(folder / f"encoder-streaming{suffix}"), decoder=str(folder / "decoder.onnx"),
        joiner=str(folder / f"joiner{suffix}"), tokens=str(folder / "tokens.txt"), num_threads=1,
    )
    stream = recogniser.create_stream()

    def decode() -> bool:
        if not recogniser.is_ready(stream):
            return False
        recogniser.decode_stream(stream)
        return True

    def hear(samples: np.ndarray) -> None:
        stream.accept_waveform(RATE, samples.astype(np.float32) / 32768)

    return hear, decode, lambda: len(recogniser.get_result_all(stream).tokens)


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(folder: Path, engine: str, int8: bool, num_chunks: int) -> dict[str, Any]:
    """Measurements of one process."""
    __import__({"torch": "torch", "onnx": "onnxruntime", "sherpa-onnx": "sherpa_onnx"}[engine])
    if engine != "sherpa-onnx":
        __import__("cascade.recognizer")
    before = resident_bytes("VmRSS")
    streams = {"sherpa-onnx": lambda: sherpa_stream(folder, int8)}
    hear, decode, count = streams.get(engine, lambda: our_stream(folder, engine, int8))()
    size = RATE * CHUNK_MS // 1000
    audio, chunks, processor, total = noise(60.0), [], [], 0.0
    for index in range(_WARM_UP + num_chunks):
        start = index * size % (len(audio) - size)
        begin = time.perf_counter()
        hear(audio[start : start + size])
        middle, cpu = time.perf_counter(), time.process_time()
        decoded = decode()
        end = time.perf_counter()
        if index >= _WARM_UP:
            total += end - begin
            if decoded:
                chunks.append(1000 * (end - middle))
                processor.append(1000 * (time.process_time() - cpu))
    percentiles = {f"chunk_compute_ms_p{p}": round(float(np.percentile(chunks, p)), 3) for p in (50, 95, 99)}
    peak = resident_bytes("VmHWM")
    seconds = (_WARM_UP + num_chunks) * CHUNK_MS / 1000
    return percentiles | {
        "chunk_cpu_ms_p50": round(float(np.median(processor)), 3), "num_chunks": len(chunks),
        "rtf": round(total * 1000 / (num_chunks * CHUNK_MS), 5), "symbols_per_second": round(count() / seconds, 2),
        "peak_memory_mb": round((peak - before) / 1e6, 1), "process_memory_mb": round(peak / 1e6, 1),
    }  # fmt: skip


def sizes(exported: Path, model: Path, engine: str, int8: bool) -> int:
    """Bytes of the files that the first pass reads."""
    if engine == "torch":
        return (model / "averaged.pt").stat().st_size
    metadata = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    files = metadata["int8"]["files"] if int8 else {}
    joiner = "joiner.onnx" if engine == "onnx" else files.get("joiner.onnx", "joiner.onnx")
    return sum(metadata["bytes"][name] for name in (
        files.get("encoder-streaming.onnx", "encoder-streaming.onnx"), "decoder.onnx", joiner,
    ))  # fmt: skip


def run(*words: str | Path) -> str:
    """Run this Python with these words on one thread; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{' '.join(map(str, words[:3]))} failed: {last}")
    return done.stdout


def cases(models: dict[str, Path], home: Path) -> list[dict[str, Any]]:
    """Export the models; one row to measure for each of them, engine and precision."""
    rows = []
    for name, folder in models.items():
        exported = home / f"{name}-onnx"
        run("-m", "cascade.bin.export_onnx", "--exp-dir", folder, "--out", exported, "--chunk-ms", str(CHUNK_MS),
            "--int8", "--no-check")  # fmt: skip
        for engine in ENGINES:
            if engine == "sherpa-onnx" and not (exported / "encoder-full.onnx").is_file():
                print(f"{name}: sherpa-onnx has no LSTM predictor", file=sys.stderr)
                continue
            for precision in PRECISIONS[: 1 if engine == "torch" else 2]:
                rows.append({
                    "model": name, "engine": engine, "precision": precision,
                    "size_bytes": sizes(exported, folder, engine, precision == "int8"),
                    "folder": str(folder if engine == "torch" else exported),
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", nargs="+", type=Path, default=[], metavar="DIR", help="model directories")
    parser.add_argument(
        "--config", nargs="+", action="append", metavar="YAML",
        help="random weights of this config: files and section.key=value; repeat the option for another model "
        "(default: egs/librispeech's teacher and student)",
    )
    parser.add_argument("--num-chunks", type=int, default=300, metavar="N", help="chunks per row (default 300)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements per row (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--measure", nargs=3, metavar=("DIR", "ENGINE", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        folder, engine, precision = arguments.measure
        print(json.dumps(measure(Path(folder), engine, precision == "int8", arguments.num_chunks)))
        return
    from cascade.bin.model_arguments import check_values
    from cascade.provenance import command_line, git_commit, instruction_sets, machine

    check_values(arguments, num_chunks=1, rounds=1)
    conf = ROOT / "egs" / "librispeech" / "conf"
    names = ("data", "teacher", "student")
    default = [[str(conf / f"{name}.yaml") for name in names[:number]] for number in (2, 3)]
    configs = arguments.config or ([] if arguments.exp_dir else default)
    models = {folder.resolve().name: folder for folder in arguments.exp_dir}
    with tempfile.TemporaryDirectory() as home:
        for words in configs:
            name = Path([word for word in words if "=" not in word][-1]).stem
            models[name] = Path(home) / name
            models[name].mkdir()
            make_model(words, models[name])
        rows = cases(models, Path(home))
        for _ in range(arguments.rounds):
            for row in rows:
                out = run(__file__, "--num-chunks", str(arguments.num_chunks), "--measure", row["folder"],
                          row["engine"], row["precision"])  # fmt: skip
                new = json.loads(out.splitlines()[-1])
                if new["chunk_compute_ms_p50"] < row.get("chunk_compute_ms_p50", np.inf):
                    row |= new
    provenance = {
        "chunk_ms": CHUNK_MS, "threads": 1, "instruction_sets": instruction_sets(), "commit": git_commit(),
        "command": command_line(), "machine": machine(),
    }  # fmt: skip
    rows = [{name: value for name, value in row.items() if name != "folder"} | provenance for row in rows]
    print(f"{provenance['machine']}; {', '.join(provenance['instruction_sets']) or 'no AVX2'}")
    for row in rows:
        print(
            f"{row['model']:<16}{row['engine']:<12}{row['precision']:<8}{row['size_bytes'] / 1e6:>8.2f} MB "
            f"p50 {row['chunk_compute_ms_p50']:>7.2f} p95 {row['chunk_compute_ms_p95']:>7.2f} "
            f"p99 {row['chunk_compute_ms_p99']:>7.2f} ms, processor {row['chunk_cpu_ms_p50']:>7.2f} ms, "
            f"RTF {row['rtf']:.4f}, {row['symbols_per_second']:.1f} symbols/s, memory {row['peak_memory_mb']:.0f} of "
            f"{row['process_memory_mb']:.0f} MB"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        main()  # with nothing imported that a runtime does not need
    else:
        from cascade.bin.cli import run_program

        run_program(main)
