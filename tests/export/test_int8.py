"""Files that compute in 8 bits: what they hold, what a stream on them says, and which of them are kept."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import onnx
import pytest
import soundfile
import torch

from cascade import Recognizer
from cascade.bin import transcribe
from cascade.config.options import ConfigError, FeatureConfig
from cascade.export import int8_loss
from cascade.export.int8 import float32_weights, quantise
from cascade.export.int8_loss import allowed_errors, compare_tokens
from cascade.export.onnx_engine import OnnxEngine
from cascade.export.parity import random_features
from cascade.export.sessions import (
    FULL,
    JOINER,
    LOOK_AHEAD,
    NONCAUSAL,
    STREAMING,
    OnlineSession,
    int8_name,
    onnx_session,
    run_session,
)
from cascade.export.sherpa import decode_offline, decode_online, open_recogniser, spell, synthetic_recordings
from cascade.measure.wer import align
from cascade.provenance import instruction_sets
from cascade.text.tokens import Tokenizer
from tests.export.conftest import KINDS, make_model_dir
from tests.export.test_export_program import SMALL, export
from tests.test_recipes import parser_of

MODES = ("streaming", "look_ahead", "full", "two_pass")


def make_manifest(folder, seconds):
    lines = []
    for number, samples in enumerate(synthetic_recordings(seconds, 16000, seed=5).values()):
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        lines.append(json.dumps({"id": str(number), "path": f"{number}.wav", "text": "one two three"}) + "\n")
    (folder / "test.jsonl").write_text("".join(lines))
    return folder / "test.jsonl"


@pytest.fixture(scope="module", params=["tied, centred, byte tokens", "lstm"])
def folder(request, tmp_path_factory):
    """An export with int8 files whose loss was measured, however large it is."""
    home = tmp_path_factory.mktemp("int8")
    model = make_model_dir(home / "student", request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = ("--manifest", make_manifest(home, (1.3, 0.8, 1.7)), "--int8", "--int8-limit", 1000)
        export(monkeypatch, "--exp-dir", model, "--out", home / "onnx", *SMALL, *options)
    return home / "onnx"


def test_products_of_layers_are_integers_and_the_rest_is_float32(exported, tmp_path):
    kept = float32_weights(exported.model)
    layers = {STREAMING: 8 * 2, NONCAUSAL: 8, LOOK_AHEAD: 8 * 3, FULL: 8 * 3, JOINER: 1}
    for name, count in layers.items():
        assert quantise(exported.folder / name, tmp_path / name, kept) == count, name
        before, after = (onnx.load(str(where / name)) for where in (exported.folder, tmp_path))
        assert {prop.key: prop.value for prop in before.metadata_props} == {
            prop.key: prop.value for prop in after.metadata_props
        }
        assert [value.name for value in before.graph.input] == [value.name for value in after.graph.input]
        stored = {weight.name: onnx.numpy_helper.to_array(weight) for weight in after.graph.initializer}
        integers = [array for array in stored.values() if array.dtype == np.int8]
        assert len(integers) == count and max(abs(array.astype(int)).max() for array in integers) == 127
        matrices = [array for array in stored.values() if array.dtype == np.float32 and array.ndim == 2]
        for array in matrices:
            assert any(array.shape in (each.shape, each.T.shape) for each in kept), array.shape
        assert len(matrices) == (0 if name == NONCAUSAL else 1)  # the front end's, the joiner's output
        behind_silu = [node for node in after.graph.node if "int8.silu_zero" in node.input[:3]]
        assert len(behind_silu) == (0 if name == JOINER else 3 * count // 8)


SATURATES = {"AVX2", "VNNI"} & {*instruction_sets()} == {"AVX2"}
"""Products of 8-bit weights overflow 16 bits in this processor; those of 7-bit ones do not."""


def test_encoder_output_stays_near_float32(exported, tmp_path):
    bits = 7 if SATURATES else 8
    quantise(exported.folder / STREAMING, tmp_path / STREAMING, float32_weights(exported.model), bits)
    features = [frames.numpy() for frames in random_features(exported.model, [80], seed=1)]
    outs = []
    for path in (exported.folder, tmp_path):
        session = OnlineSession(path / STREAMING)
        state, out = session.initial_state(1), []
        for start in range(0, 80, session.step_frames):
            frames, state = session.step(features[0][None, start : start + session.step_frames], state)
            out.append(frames)
        outs.append(np.concatenate(out))
    assert 0 < np.linalg.norm(outs[0] - outs[1]) < 0.02 * np.linalg.norm(outs[0])


@pytest.mark.parametrize("bits", [7, 8])
def test_a_joiner_in_8_bits_stays_near_its_float32_logits(exported, tmp_path, bits):
    if bits == 8 and SATURATES:
        pytest.skip("this processor has AVX2 without VNNI: 8-bit weights overflow")
    quantise(exported.folder / JOINER, tmp_path / JOINER, float32_weights(exported.model), bits)
    rng = np.random.default_rng(1)
    joiner = exported.model.joiner
    frames, vectors = (
        rng.standard_normal((9, layer.in_features)).astype(np.float32) for layer in (joiner.encoder_proj, joiner.output)
    )
    frames[3] *= 1000.0  # a loud row costs the others nothing
    frames[4] = 0.0
    before, after = (
        run_session(onnx_session(path / JOINER), frames, vectors)[0] for path in (exported.folder, tmp_path)
    )
    others = [row for row in range(9) if row != 3]
    assert 0 < np.abs(before - after)[others].max() < 0.05 * np.abs(before).max()
    np.testing.assert_allclose(before[4], after[4], atol=1e-5)


def test_an_integer_sum_of_7_bit_weights_fits_16_bits(exported, tmp_path):
    quantise(exported.folder / JOINER, tmp_path / JOINER, float32_weights(exported.model), 7)
    arrays = [onnx.numpy_helper.to_array(weight) for weight in onnx.load(str(tmp_path / JOINER)).graph.initializer]
    largest = max(int(abs(array.astype(int)).max()) for array in arrays if array.dtype == np.int8)
    assert 2 * 255 * largest < 1 << 15


def test_export_says_what_is_in_8_bits_and_what_it_costs(folder):
    about = json.loads((folder / "export.json").read_text())
    int8 = about["int8"]
    names = {STREAMING, NONCAUSAL, JOINER, *({LOOK_AHEAD, FULL} if (folder / FULL).is_file() else ())}
    assert int8["files"] == {name: int8_name(name) for name in names} and int8["float32"] == {}
    for name, other in int8["files"].items():
        assert about["bytes"][other] == (folder / other).stat().st_size
        assert about["bytes"][name] > 0
    found = {(row["part"], row["mode"]) for row in int8["rows"]}
    ours = {(part, mode) for part in (STREAMING, JOINER, int8_loss.TOGETHER) for mode in MODES[:3]}
    ours |= {(NONCAUSAL, "look_ahead"), (NONCAUSAL, "full")}
    assert found == ours | ({(LOOK_AHEAD, "look_ahead"), (FULL, "full")} if FULL in names else set())
    for row in int8["rows"]:
        assert row["num_words"] == 9 and 50 < row["equal_tokens_percent"] <= 100 and row["within_limit"]
    card = (folder / "README.md").read_text()
    assert re.search(r"\| encoder-streaming.onnx +\| look_ahead +\|", card)
    assert re.search(r"encoder-streaming.int8.onnx \(\d\.\d\d of float32's size\)", card)


def test_the_readmes_commands_parse(folder, monkeypatch):
    text = (folder / "README.md").read_text()
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "-m cascade.bin." in line]
    assert len(lines) == 3 and any("--int8" in words for words in lines)
    for python, _, program, *words in lines:
        assert python == "python"
        parser = parser_of(program, monkeypatch)
        monkeypatch.undo()
        parser.parse_args(words)


@pytest.mark.parametrize("mode", MODES)
def test_a_streams_text_does_not_depend_on_the_others_of_its_batch(folder, mode):
    recordings = list(synthetic_recordings((2.0, 1.2, 1.6), 16000, seed=7).values())
    recordings[1] *= 0.01
    together = Recognizer(folder, mode=mode, int8=True)
    streams = [together.stream() for _ in recordings]
    for stream, samples in zip(streams, recordings, strict=True):
        stream.push(samples, 16000)
        stream.end()
    together.advance()
    for stream, samples in zip(streams, recordings, strict=True):
        alone = Recognizer(folder, mode=mode, int8=True).stream()
        alone.push(samples, 16000)
        ours, theirs = alone.finish(), stream.final()
        assert ours.text == theirs.text != ""
        assert [part.hypotheses[0].timestamps for part in ours.segments] == [
            part.hypotheses[0].timestamps for part in theirs.segments
        ]


def test_files_that_lose_words_stay_float32_and_the_log_says_so(folder, tmp_path, monkeypatch, caplog):
    model = folder.parent / "student"
    monkeypatch.setattr(int8_loss, "allowed_errors", lambda errors, limit: errors - 1)
    options = ("--manifest", folder.parent / "test.jsonl", "--int8")
    (tmp_path / "encoder-full.int8.onnx").write_text("of an earlier export")
    (tmp_path / "export.json").write_text('{"bytes": {"encoder-full.int8.onnx": 20}}')
    export(monkeypatch, "--exp-dir", model, "--out", tmp_path, *SMALL, *options)
    int8 = json.loads((tmp_path / "export.json").read_text())["int8"]
    assert int8["files"] == {} and len(int8["float32"]) == (5 if (tmp_path / FULL).is_file() else 3)
    assert not list(tmp_path.glob("*.int8.onnx"))
    assert "encoder-streaming.onnx STAYS float32: " in caplog.text
    assert "encoder-streaming.onnx stays float32: " in (tmp_path / "README.md").read_text()
    samples = synthetic_recordings((1.2,), 16000, seed=7).popitem()[1]
    said = []
    for int8_too in (False, True):
        stream = Recognizer(tmp_path, int8=int8_too).stream()
        stream.push(samples, 16000)
        said.append(stream.finish().text)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("errors", "limit", "allowed"), [(0, 2.0, 0), (10, 2.0, 11), (50, 2.0, 51), (100, 2.0, 102), (100, 0.0, 100)]
)
def test_the_limit_is_relative_and_rounded_up_to_a_whole_error(errors, limit, allowed):
    assert allowed_errors(errors, limit) == allowed


@pytest.mark.parametrize("expected, tokens, equal, every", [
    ([1, 2, 3], [1, 2, 3], 3, 3), ([1, 2, 3], [1, 4, 2, 3], 3, 4), ([1, 2, 3], [1, 3], 2, 3), ([], [5], 0, 1),
    ([], [], 0, 0), ([1], [2], 0, 1),
])  # fmt: skip
def test_a_token_that_only_one_of_both_says_is_no_equal_token(expected, tokens, equal, every):
    assert compare_tokens(expected, tokens) == {"equal": equal, "all": every}


def test_int8_is_one_word_everywhere(folder, tmp_path, monkeypatch, capsys):
    samples = synthetic_recordings((1.2,), 16000, seed=7).popitem()[1]
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    words = ["--onnx-dir", folder, "--int8", "--json", tmp_path / "a.wav"]
    monkeypatch.setattr("sys.argv", [transcribe.__file__, *map(str, words)])
    transcribe.main()
    stream = Recognizer(folder, int8=True).stream()
    stream.push(soundfile.read(tmp_path / "a.wav", dtype="float32")[0], 16000)
    assert json.loads(capsys.readouterr().out)["text"] == stream.finish().text != ""
    with pytest.raises(ConfigError, match="int8 needs exported files"):
        Recognizer(folder.parent / "student", int8=True)
    monkeypatch.setattr("sys.argv", [transcribe.__file__, "--exp-dir", str(folder.parent / "student"), "--int8", "a"])
    with pytest.raises(ConfigError, match="--int8 needs --onnx-dir"):
        transcribe.main()


def test_a_folder_without_int8_files_is_named(tmp_path, monkeypatch):
    model = make_model_dir(tmp_path / "student", next(iter(KINDS)))
    export(monkeypatch, "--exp-dir", model, "--out", tmp_path / "onnx", *SMALL, "--no-check")
    with pytest.raises(ValueError, match="onnx has no int8 files: export it with export_onnx --int8"):
        OnnxEngine(tmp_path / "onnx", int8=True)


def test_a_processor_without_vnni_is_warned(folder, monkeypatch, caplog):
    monkeypatch.setattr("cascade.export.onnx_engine.instruction_sets", lambda: ["AVX2"])
    OnnxEngine(folder, int8=True)
    about = json.loads((folder / "export.json").read_text())
    assert ("this processor has no VNNI" in caplog.text) == (about["int8"]["weight_bits"] == 8)


def test_instruction_sets_are_named_in_their_order():
    assert set(instruction_sets()) <= {"AVX2", "AVX512", "VNNI"}


@pytest.mark.parametrize("joiner", [JOINER, int8_name(JOINER)])
def test_sherpa_onnx_decodes_int8_files(folder, joiner):
    """Our runtime's projection is float32 always: with the same joiner both say the same, as far as rounding goes."""
    pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    if not (folder / FULL).is_file():
        pytest.skip("sherpa-onnx has no LSTM predictor")
    samples = synthetic_recordings((2.0,), 16000, seed=5).popitem()[1]
    padded = np.concatenate((samples, np.zeros(2720, np.float32)))  # one block and one frame
    for mode, encoder in (("streaming", STREAMING), ("look_ahead", LOOK_AHEAD), ("full", FULL)):
        recogniser = open_recogniser(folder, int8_name(encoder), FeatureConfig(), joiner=joiner)
        (theirs,) = (decode_offline if mode == "full" else decode_online)(recogniser, [padded], 16000)
        stream = Recognizer(folder, mode=mode, int8=True, endpoint=None).stream()
        stream.push(samples, 16000)
        ours = spell(stream.finish().segments[0].hypotheses[0], Tokenizer.load(folder))
        equal = sum(left == right for left, right in align(ours, theirs[: len(ours)]))
        assert equal > (0.95 if joiner == JOINER else 0.7) * len(ours) > 5, (mode, ours, theirs)


def test_a_model_of_torch_is_not_touched(exported, tmp_path):
    before = exported.model.joiner.encoder_proj.weight.clone()
    quantise(exported.folder / JOINER, tmp_path / JOINER, float32_weights(exported.model))
    assert torch.equal(before, exported.model.joiner.encoder_proj.weight)
