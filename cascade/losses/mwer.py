"""Minimum word error rate: the expected word errors over the N-best of a search (1712.01818)."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def mwer_loss(log_likelihoods: Tensor, errors: Tensor, lengths: Tensor) -> Tensor:
    """sum_i P_i (W_i - mean W) of each utterance, P = softmax over its hypotheses of log P(y_i | x).

    The gradient goes through all of P: a hypothesis gains where it has fewer errors than are expected.

    Args:
      log_likelihoods: (M,) log P(y_i | x), each a sum over all alignments; the hypotheses of one utterance after
        those of the other.
      errors: (M,) word errors W_i. lengths: (N,) hypotheses of each utterance, at least 1; they sum to M.
    Returns:
      (N,) losses; 0 where there is one hypothesis.
    """
    sizes, errors = lengths.tolist(), errors.to(log_likelihoods)
    probs = pad_sequence(log_likelihoods.split(sizes), batch_first=True, padding_value=-torch.inf).softmax(dim=1)
    errors = pad_sequence(errors.split(sizes), batch_first=True)
    return (probs * errors).sum(dim=1) - errors.sum(dim=1) / lengths.to(errors)
