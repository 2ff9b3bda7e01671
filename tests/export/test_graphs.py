"""Every exported graph against PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from cascade.export.onnx import DECODER, FULL, JOINER, LOOK_AHEAD, MODES, STREAMING
from cascade.export.parity import (
    OnlineSession,
    graph_differences,
    onnx_session,
    random_features,
    run_session,
    stream_together,
)
from tests.export.conftest import GEOMETRY

CLOSE = {"rtol": 1e-5, "atol": 3e-5}


def encode(model, features, file):
    """One utterance by itself: (T, F) -> (T // 4, D)."""
    block = GEOMETRY.block_frames if file == LOOK_AHEAD else None
    lens = torch.tensor([len(features)])
    with torch.inference_mode():
        return model.encode(features[None], lens, MODES[file], GEOMETRY.chunk_frames, GEOMETRY.left_frames, block)[0][0]


@pytest.mark.parametrize("file", [STREAMING, LOOK_AHEAD])
def test_uneven_streams_of_different_age_in_one_batch_equal_whole_utterances(exported, file):
    encoder = OnlineSession(exported.folder / file)
    assert encoder.step_frames == 4 * (GEOMETRY.block_frames if file == LOOK_AHEAD else GEOMETRY.chunk_frames)
    features = random_features(exported.model, [7 * encoder.step_frames + 3, encoder.step_frames, 96], seed=5)
    for stream, out in zip(features, stream_together(encoder, features), strict=True):
        whole = encode(exported.model, stream[: len(stream) // encoder.step_frames * encoder.step_frames], file)
        assert_close(out, whole, **CLOSE)


@pytest.mark.parametrize("file", [STREAMING, LOOK_AHEAD])
def test_a_new_stream_is_not_touched_by_an_old_one_in_its_batch(exported, file):
    encoder = OnlineSession(exported.folder / file)
    old, new = random_features(exported.model, [encoder.step_frames] * 2, seed=6)
    alone, alone_state = encoder.step(new[None], encoder.initial_state(1))
    aged = encoder.initial_state(1)
    for _ in range(5):
        _, aged = encoder.step(old[None], aged)
    joined = [torch.cat(tensors) for tensors in zip(aged, encoder.initial_state(1), strict=True)]
    out, state = encoder.step(torch.stack((old, new)), joined)
    assert_close(out[1:], alone, **CLOSE)
    assert state[-1].tolist() == [6 * encoder.step_frames // 4, encoder.step_frames // 4]
    for left, right in zip(state, alone_state, strict=True):
        assert_close(left[1:], right, **CLOSE)


@pytest.mark.parametrize("lengths", [(133, 57, 200), (64,), (3, 41), (1,), (0,)])
def test_offline_graph_equals_whole_utterances_whatever_the_padding(exported, lengths):
    features = random_features(exported.model, lengths, seed=7)
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=-23.0)
    out, out_lens = run_session(onnx_session(exported.folder / FULL), padded, torch.tensor(lengths))
    assert out_lens.tolist() == [length // 4 for length in lengths]
    for utterance, row, length in zip(features, out, out_lens.tolist(), strict=True):
        assert_close(row[:length], encode(exported.model, utterance, FULL), **CLOSE)


def test_decoder_takes_minus_one_and_blank_for_nothing_said(exported):
    session = onnx_session(exported.folder / DECODER)
    size, last = exported.model.predictor.context_size, exported.model.vocab_size - 1
    labels = torch.tensor([[-1] * (size - 1) + [0], [0] * size, [-1] * size, [-1] * (size - 1) + [last]])
    (out,) = run_session(session, labels)
    with torch.inference_mode():
        nothing = exported.model.predictor(torch.zeros(1, 0, dtype=torch.int64))[0, 0]
        once = exported.model.predictor(torch.tensor([[last]]))[0, 1]
    for row in out[:3]:
        assert_close(row, nothing, **CLOSE)
    assert_close(out[3], once, **CLOSE)
    assert not torch.allclose(once, nothing, atol=1e-2)


def test_decoder_reads_the_oldest_label_first(exported):
    said = torch.arange(2, 2 + exported.model.predictor.context_size)
    (out,) = run_session(onnx_session(exported.folder / DECODER), said[None])
    with torch.inference_mode():
        assert_close(out[0], exported.model.predictor(said[None])[0, -1], **CLOSE)


def test_graphs_bind_as_sherpa_onnx_expects(exported):
    for file in (STREAMING, LOOK_AHEAD):
        session = onnx_session(exported.folder / file)
        about = session.get_modelmeta().custom_metadata_map
        assert about["model_type"] == "ebranchformer" and about["chunk_ms"] == "80"
        inputs, outputs = session.get_inputs(), session.get_outputs()
        assert len(inputs) == len(outputs) == 4 * int(about["num_hidden_layers"]) + 2
        # Only the batch is dynamic, and what comes out can go in.
        assert all(item.shape[0] == "N" for item in [*inputs, *outputs])
        encoder = OnlineSession(exported.folder / file)
        zeros = encoder.initial_state(3)
        assert [list(tensor.shape[1:]) for tensor in zeros] == [item.shape[1:] for item in inputs[1:]]
        states = encoder.step(torch.zeros(3, *inputs[0].shape[1:]), zeros)[1]
        assert [tensor.shape for tensor in states] == [tensor.shape for tensor in zeros]
        assert [item.type for item in inputs] == ["tensor(float)"] * (len(inputs) - 1) + ["tensor(int64)"]
    decoder = onnx_session(exported.folder / DECODER)
    assert [len(decoder.get_inputs()), len(decoder.get_outputs())] == [1, 1]
    about = decoder.get_modelmeta().custom_metadata_map
    assert int(about["vocab_size"]) == exported.tokenizer.vocab_size
    assert int(about["context_size"]) == exported.model.predictor.context_size
    assert onnx_session(exported.folder / FULL).get_modelmeta().custom_metadata_map["model_type"] == "conformer"


def test_parity_is_measured_on_every_file_and_notices_other_weights(exported):
    differences = graph_differences(exported.folder, exported.model, GEOMETRY)
    assert set(differences) == {STREAMING, LOOK_AHEAD, FULL, DECODER, JOINER}
    assert max(differences.values()) < 1e-4
    changes = {
        STREAMING: "encoder.causal.layers.1.attention.in_proj.weight",
        LOOK_AHEAD: "encoder.noncausal.layers.0.convolution.depthwise.weight",
        JOINER: "joiner.output.bias",
    }
    for file, name in changes.items():
        other = copy.deepcopy(exported.model)
        values = other.get_parameter(name).data.view(-1)
        values[0] += 1.0
        with pytest.raises(ValueError, match=f"differ from PyTorch.*{file}"):
            graph_differences(exported.folder, other, GEOMETRY)
