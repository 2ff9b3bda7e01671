"""Every exported graph against PyTorch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.testing import assert_close

from cascade.export.onnx import DECODER, FULL, JOINER, LOOK_AHEAD, NONCAUSAL, STREAMING
from cascade.export.parity import graph_differences, random_features, stream_together
from cascade.export.sessions import NoncausalSession, OnlineSession, onnx_session, read_weights, run_session
from tests.export.conftest import GEOMETRY

CLOSE = {"rtol": 1e-5, "atol": 3e-5}


def encode(model, features, file):
    """One utterance by itself: (T, F) -> (T // 4, C)."""
    lens = torch.tensor([len(features)])
    with torch.inference_mode():
        out, lens = model.encoder.forward_causal(features[None], lens, GEOMETRY.chunk_frames, GEOMETRY.left_frames)
        if file != STREAMING:
            block = GEOMETRY.block_frames if file == LOOK_AHEAD else None
            out = model.encoder.forward_noncausal(out, lens, block, GEOMETRY.left_frames)
    return out[0]


def run(path, *values):
    """Tensors in, tensors out."""
    return [torch.from_numpy(out) for out in run_session(onnx_session(path), *(value.numpy() for value in values))]


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
    alone, alone_state = encoder.step(new[None].numpy(), encoder.initial_state(1))
    aged = encoder.initial_state(1)
    for _ in range(5):
        _, aged = encoder.step(old[None].numpy(), aged)
    joined = [np.concatenate(arrays) for arrays in zip(aged, encoder.initial_state(1), strict=True)]
    out, state = encoder.step(torch.stack((old, new)).numpy(), joined)
    assert_allclose(out[1:], alone, **CLOSE)
    assert state[-1].tolist() == [6 * encoder.step_frames // 4, encoder.step_frames // 4]
    for left, right in zip(state, alone_state, strict=True):
        assert_allclose(left[1:], right, **CLOSE)


@pytest.mark.parametrize("lengths", [(133, 57, 200), (64,), (3, 41), (1,), (0,)])
def test_offline_graph_equals_whole_utterances_whatever_the_padding(exported, lengths):
    features = random_features(exported.model, lengths, seed=7)
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=-23.0)
    out, out_lens = run(exported.folder / FULL, padded, torch.tensor(lengths))
    assert out_lens.tolist() == [length // 4 for length in lengths]
    for utterance, row, length in zip(features, out, out_lens.tolist(), strict=True):
        assert_close(row[:length], encode(exported.model, utterance, FULL), **CLOSE)


def test_the_noncausal_graph_goes_on_from_the_streaming_graphs_output(exported):
    """One after the other they are PyTorch's look-ahead and full pass; no feature is read again."""
    features = random_features(exported.model, [64, 48, 24], seed=8)
    causal_out = stream_together(OnlineSession(exported.folder / STREAMING), features)
    noncausal, block = NoncausalSession(exported.folder / NONCAUSAL), GEOMETRY.block_frames
    padded = torch.nn.utils.rnn.pad_sequence(causal_out, batch_first=True, padding_value=9.0).numpy()
    lens = np.array([len(out) for out in causal_out])
    segments = noncausal.whole(padded, lens)
    states, blocks = noncausal.initial_state(3), []
    for start in range(0, padded.shape[1], block):
        out, states = noncausal.step(padded[:, start : start + block], (lens - start).clip(0, block), states)
        blocks.append(out)
    for row, stream in enumerate(features):
        for out, file in ((segments, FULL), (np.concatenate(blocks, axis=1), LOOK_AHEAD)):
            assert_close(torch.from_numpy(out[row, : lens[row]]), encode(exported.model, stream, file), **CLOSE)


def test_weights_are_read_out_of_a_file(exported):
    weights = read_weights(exported.folder / JOINER)
    assert all(weight.flags.aligned for weight in weights.values())  # unaligned ones are copied by every product
    expected = {f"joiner.{name}": value.detach().numpy() for name, value in exported.model.joiner.named_parameters()}
    assert set(weights) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value)


def test_decoder_takes_minus_one_and_blank_for_nothing_said(exported):
    size, last = exported.model.predictor.context_size, exported.model.vocab_size - 1
    labels = torch.tensor([[-1] * (size - 1) + [0], [0] * size, [-1] * size, [-1] * (size - 1) + [last]])
    (out,) = run(exported.folder / DECODER, labels)
    with torch.inference_mode():
        nothing = exported.model.predictor(torch.zeros(1, 0, dtype=torch.int64))[0, 0]
        once = exported.model.predictor(torch.tensor([[last]]))[0, 1]
    for row in out[:3]:
        assert_close(row, nothing, **CLOSE)
    assert_close(out[3], once, **CLOSE)
    assert not torch.allclose(once, nothing, atol=1e-2)


def test_decoder_reads_the_oldest_label_first(exported):
    said = torch.arange(2, 2 + exported.model.predictor.context_size)
    (out,) = run(exported.folder / DECODER, said[None])
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
        assert [list(array.shape[1:]) for array in zeros] == [item.shape[1:] for item in inputs[1:]]
        states = encoder.step(np.zeros((3, *inputs[0].shape[1:]), np.float32), zeros)[1]
        assert [array.shape for array in states] == [array.shape for array in zeros]
        assert [item.type for item in inputs] == ["tensor(float)"] * (len(inputs) - 1) + ["tensor(int64)"]
    decoder = onnx_session(exported.folder / DECODER)
    assert [len(decoder.get_inputs()), len(decoder.get_outputs())] == [1, 1]
    about = decoder.get_modelmeta().custom_metadata_map
    assert int(about["vocab_size"]) == exported.tokenizer.vocab_size
    assert int(about["context_size"]) == exported.model.predictor.context_size
    assert onnx_session(exported.folder / FULL).get_modelmeta().custom_metadata_map["model_type"] == "conformer"


def test_parity_is_measured_on_every_file_and_notices_other_weights(exported):
    differences = graph_differences(exported.folder, exported.model, GEOMETRY)
    assert set(differences) == {STREAMING, NONCAUSAL, LOOK_AHEAD, FULL, DECODER, JOINER}
    assert max(differences.values()) < 1e-4
    changes = {
        STREAMING: "encoder.causal.layers.1.attention.in_proj.weight",
        f"{LOOK_AHEAD}.*{NONCAUSAL}": "encoder.noncausal.layers.0.convolution.depthwise.weight",
        JOINER: "joiner.output.bias",
    }
    for file, name in changes.items():
        other = copy.deepcopy(exported.model)
        values = other.get_parameter(name).data.view(-1)
        values[0] += 1.0
        with pytest.raises(ValueError, match=f"differ from PyTorch.*{file}"):
            graph_differences(exported.folder, other, GEOMETRY)
