import random

import pytest
import torch

from cascade.config.load import load_config
from cascade.models.build import build_model, params_by_part
from cascade.models.encoder import ENCODERS
from cascade.models.masks import block_attention_mask, padding_mask
from cascade.models.state import map_state, state_tensors
from tests.models.convolutional_encoder import ConvolutionalEncoder

MEL_BINS = 10
KINDS = (*ENCODERS, "convolutional")


@pytest.fixture(scope="module", autouse=True)
def convolutional():
    """The tests' own encoder among those that a config may name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "convolutional", ConvolutionalEncoder)
        yield


def small_model(convolution="centred", kernel_size=5, seed=0, predictor="tied_reduced", kind="conformer"):
    torch.manual_seed(seed)
    config = load_config(overrides=[
        "model.d_model=8", "model.subsampling_channels=3", "model.joiner_dim=6", f"features.num_mel_bins={MEL_BINS}",
        "model.causal.num_layers=3", "model.causal.num_heads=2", "model.causal.feedforward_dim=12",
        f"model.causal.kernel_size={kernel_size}", "model.noncausal.num_layers=2", "model.noncausal.num_heads=2",
        "model.noncausal.feedforward_dim=12", f"model.noncausal.kernel_size={kernel_size}",
        f"model.noncausal.convolution={convolution}", f"model.predictor.kind={predictor}",
        "model.predictor.embedding_dim=7", "model.predictor.hidden_dim=9", "model.predictor.context_size=3",
        f"model.causal.kind={kind}", f"model.noncausal.kind={kind}",
    ])
    model = build_model(config, vocab_size=11).double().eval()
    model.encoder.set_feature_stats(torch.randn(MEL_BINS).double(), torch.rand(MEL_BINS).double() + 0.5)
    return model


def random_batch(rng, max_frames=190):
    lens = torch.tensor([rng.randint(1, max_frames) for _ in range(rng.randint(1, 4))])
    return torch.randn(len(lens), int(lens.max()), MEL_BINS, dtype=torch.float64), lens


def run_chunks(model, features, lens, chunk, left):
    state = model.encoder.initial_state(len(lens), left)
    outs = []
    for start in range(0, features.shape[1], 4 * chunk):
        piece = features[:, start : start + 4 * chunk]
        out, state = model.encoder.forward_chunk(piece, state, (lens - start).clamp(0, piece.shape[1]))
        outs.append(out)
    return torch.cat(outs, dim=1)


def run_blocks(model, causal_out, lens, block, left):
    state = model.encoder.initial_block_state(len(lens), left)
    outs = []
    for start in range(0, causal_out.shape[1], block):
        piece = causal_out[:, start : start + block]
        out, state = model.encoder.forward_block(piece, state, (lens - start).clamp(0, piece.shape[1]))
        outs.append(out)
    return torch.cat(outs, dim=1) if outs else causal_out


def largest_difference(a, b, lens):
    keep = ~padding_mask(lens, a.shape[1])
    return float((a - b).detach()[keep].abs().max()) if keep.any() else 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_streamed_output_equals_whole_utterance(seed, kind):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = small_model(rng.choice(["left", "centred"]), rng.choice([1, 3, 5, 9]), seed, kind=kind)
    features, lens = random_batch(rng)
    chunk, left = rng.randint(1, 12), rng.choice([0, 1, 5, 16, 60])
    block = chunk * rng.randint(1, 4)
    causal, out_lens = model.encoder.forward_causal(features, lens, chunk, left)
    noncausal = model.encoder.forward_noncausal(causal, out_lens, block, left)
    streamed = run_chunks(model, features, lens, chunk, left)
    assert streamed.shape == causal.shape
    assert largest_difference(streamed, causal, out_lens) < 1e-9
    assert largest_difference(run_blocks(model, streamed, out_lens, block, left), noncausal, out_lens) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_of_several_chunks_is_one_after_the_other(kind):
    torch.manual_seed(3)
    causal, left = small_model("left", kind=kind).encoder.causal, 7
    x = torch.randn(2, 24, 8).double()
    whole = causal(x, torch.tensor([24, 24]), 3, left)
    state, outs = causal.initial_state(2, left), []
    for start in range(0, 24, 12):
        out, state = causal.forward_chunk(x[:, start : start + 12], state, chunk=3)
        outs.append(out)
    assert torch.allclose(torch.cat(outs, dim=1), whole, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_a_state_is_that_of_its_tensors(kind):
    for encoder in (small_model(kind=kind).encoder.causal, small_model(kind=kind).encoder.noncausal):
        shapes = [tensor.shape for tensor in state_tensors(encoder.initial_state(3, 5))]
        assert shapes == [(3, *part.shape) for part in encoder.state_layout(5)]


def test_future_frames_do_not_change_causal_output():
    model = small_model()
    features, lens = torch.randn(1, 96, MEL_BINS).double(), torch.tensor([96])
    changed = features.clone()
    changed[:, 64:] = torch.randn(1, 32, MEL_BINS).double()
    for chunk in (4, 8):
        before = model.encoder.forward_causal(features, lens, chunk, 8)[0]
        after = model.encoder.forward_causal(changed, lens, chunk, 8)[0]
        assert torch.equal(before[:, :16], after[:, :16])
        assert not torch.equal(before[:, 16:], after[:, 16:])


def test_look_ahead_ends_at_its_block():
    model = small_model()
    causal, lens = torch.randn(1, 24, 8).double(), torch.tensor([24])
    changed = causal.clone()
    changed[:, 16:] = torch.randn(1, 8, 8).double()
    before = model.encoder.forward_noncausal(causal, lens, 8, 8)
    after = model.encoder.forward_noncausal(changed, lens, 8, 8)
    assert torch.allclose(before[:, :16], after[:, :16], atol=1e-12)
    full_before = model.encoder.forward_noncausal(causal, lens, None, 8)
    full_after = model.encoder.forward_noncausal(changed, lens, None, 8)
    assert not torch.allclose(full_before[:, 0], full_after[:, 0], atol=1e-6)


@pytest.mark.parametrize("mode", ["streaming", "look_ahead", "full"])
def test_padding_and_batch_do_not_change_an_utterance(mode):
    torch.manual_seed(1)
    model = small_model()
    features, lens = torch.randn(3, 131, MEL_BINS).double(), torch.tensor([131, 70, 5])
    features[1, 70:] = 1e3
    together, out_lens = model.encode(features, lens, mode, 4, 8, 8)
    for index in range(3):
        one = features[index : index + 1, : lens[index]]
        alone, alone_lens = model.encode(one, lens[index : index + 1], mode, 4, 8, 8)
        assert alone_lens[0] == out_lens[index] == lens[index] // 4
        assert torch.allclose(alone[0], together[index, : alone_lens[0]], atol=1e-10)


def test_streams_join_wait_and_leave_without_disturbing_each_other():
    torch.manual_seed(2)
    model = small_model()
    encoder, left, chunk = model.encoder, 8, 4
    features, lens = torch.randn(2, 96, MEL_BINS).double(), torch.tensor([96, 96])
    whole, _ = encoder.forward_causal(features, lens, chunk, left)
    first, state = encoder.forward_chunk(features[:1, :16], encoder.initial_state(1, left))
    state = map_state(lambda *streams: torch.cat(streams), state, encoder.initial_state(1, left))
    # Stream 0 goes on, stream 1 waits, then both run, then stream 0 leaves.
    both = torch.stack((features[0, 16:32], torch.full((16, MEL_BINS), 7.0).double()))
    second, state = encoder.forward_chunk(both, state, torch.tensor([16, 0]))
    third, state = encoder.forward_chunk(torch.stack((features[0, 32:48], features[1, :16])), state)
    state = map_state(lambda streams: streams[1:], state)
    fourth, state = encoder.forward_chunk(features[1:, 16:32], state)
    assert torch.allclose(torch.cat((first[0], second[0], third[0])), whole[0, :12], atol=1e-10)
    assert torch.allclose(torch.cat((third[1], fourth[0])), whole[1, :8], atol=1e-10)
    assert all(tensor.shape[0] == 1 for tensor in state_tensors(state))


def test_a_streams_age_does_not_reach_the_arithmetic():
    model = small_model()
    state = model.encoder.initial_state(1, 8)
    _, state = model.encoder.forward_chunk(torch.randn(1, 64, MEL_BINS).double(), state)
    old = state._replace(encoder=state.encoder._replace(processed_lens=state.encoder.processed_lens + 10**9))
    chunk = torch.randn(1, 16, MEL_BINS).double()
    assert torch.equal(model.encoder.forward_chunk(chunk, state)[0], model.encoder.forward_chunk(chunk, old)[0])


def test_block_mask_follows_the_written_rule():
    lens = torch.tensor([13, 6])
    for block, left in ((1, 0), (3, 2), (4, 4), (5, 100), (100, 3)):
        mask = block_attention_mask(lens, 13, block, left)[:, 0]
        for n, length in enumerate(lens.tolist()):
            for i in range(length):
                start = i // block * block
                expected = [max(0, start - left) <= j < min(length, start + block) for j in range(13)]
                assert mask[n, i].tolist() == expected


def test_short_utterances_have_no_encoder_frames():
    model = small_model()
    for frames in range(1, 9):
        out, lens = model.encode(torch.randn(1, frames, MEL_BINS).double(), torch.tensor([frames]), "full", 4, 8)
        assert out.shape[1] == frames // 4 == lens[0]


def test_state_maps_over_every_tensor():
    state = small_model().encoder.initial_state(2, 4)
    tensors = state_tensors(map_state(lambda tensor: tensor + 1, state))
    assert len(tensors) == 1 + 3 * 3 + 1
    assert all(bool((tensor == 1).all()) for tensor in tensors)


def test_full_size_pair_keeps_the_promised_sizes():
    teacher = build_model(load_config(overrides=["model.causal.num_layers=22", "model.predictor.kind=lstm"]), 500)
    student = build_model(load_config(overrides=["model.causal.num_layers=10"]), 500)
    sizes = [params_by_part(model)["total"] for model in (teacher, student)]
    assert 40.5e6 < sizes[0] < 42e6
    assert sizes[1] <= 0.52 * sizes[0]
