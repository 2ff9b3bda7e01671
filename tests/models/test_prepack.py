"""The layout for the CPU's kernels changes speed and rounding, nothing else."""

import copy

import torch
from torch import nn

from cascade.models.build import params_by_part
from cascade.models.prepack import PrepackedLinear, prepack
from tests.models.test_encoder import MEL_BINS, small_model


def encoded(model, features):
    state = model.encoder.initial_state(len(features), 8)
    out, _ = model.encoder.forward_chunk(features, state)
    noncausal = model.encoder.forward_noncausal(out, torch.full((len(features),), out.shape[1]), None, None)
    return model.joiner.project_encoder(torch.cat((out, noncausal)))


@torch.inference_mode()
def test_a_prepacked_model_says_the_same():
    plain = small_model().float()
    packed = prepack(copy.deepcopy(plain), least_weights=1)
    assert not any(isinstance(module, nn.Linear) for module in packed.encoder.causal.modules())
    # What sees any number of frames, or is read by the searches, stays plain.
    others = (*packed.encoder.noncausal.modules(), packed.joiner.encoder_proj, packed.joiner.output)
    assert not any(isinstance(module, PrepackedLinear) for module in others)
    assert params_by_part(packed) == params_by_part(plain)
    for batch_size in (1, 3):
        features = torch.randn(batch_size, 32, MEL_BINS)
        torch.testing.assert_close(encoded(packed, features), encoded(plain, features), rtol=1e-5, atol=1e-5)


def test_a_float64_model_stays_as_it_is():
    model = prepack(small_model(), least_weights=1)
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())


def test_a_layer_without_bias_and_a_strided_input_are_taken():
    linear = nn.Linear(6, 5, bias=False)
    x = torch.randn(2, 6, 3).transpose(1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(PrepackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-6)


def test_small_layers_stay_as_they_are():
    model = prepack(small_model().float())
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())
