"""Every option of an experiment, as frozen dataclasses with a string below each field that documents it.

Lengths of chunks, blocks and contexts are in 40 ms encoder frames unless the name carries a unit. A new option is one
field here; `config.rules` has what several options must satisfy together.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

FRAME_SHIFT_MS = 10
SUBSAMPLING = 4
ENCODER_FRAME_MS = FRAME_SHIFT_MS * SUBSAMPLING

Mode = Literal["streaming", "look_ahead", "full"]
"""Passes: the causal one, the non-causal one over blocks, the non-causal one over whole utterances."""
MODES: tuple[Mode, ...] = ("streaming", "look_ahead", "full")


class ConfigError(ValueError):
    """A wrong option: the message names the option, its value and the remedy. Programs exit with 2."""


class Limits(NamedTuple):
    """Values that an option may have besides those of its type, and what another value means for a training."""

    at_least: float | None = None
    """Of a list: each of its numbers."""
    at_most: float | None = None
    below: float | None = None
    or_all: bool = False
    """-1 is allowed too; it means all."""
    may_be_infinite: bool = False
    unbounded: str = ""
    """Reason why a number has no lower bound."""
    goes_on: bool = False
    """A training in --exp-dir goes on with another value; without this it starts over. Only for what changes no number
    of a training, and for training.precision: a run may go on where `auto` means another one, and the log says so."""


def option(default: Any, **limits: Any) -> Any:
    """The field of an option with this default and these `Limits`."""
    return field(default=default, metadata={"limits": Limits(**limits)})


@dataclass(frozen=True)
class FeatureConfig:
    sampling_rate: int = option(16000, at_least=8000)
    """Hz; recordings at another rate are resampled."""
    num_mel_bins: int = option(80, at_least=4)
    """Mel bins F of the Kaldi-style log-mel fbank (25 ms window, 10 ms shift)."""
    extractor: Literal["kaldi-native-fbank", "kaldifeat"] = option("kaldi-native-fbank", goes_on=True)
    """Package that computes the fbank for training, both equally; tools/install_kaldifeat.sh builds kaldifeat."""


@dataclass(frozen=True)
class TokenConfig:
    """Only stage 2 reads these; what came of them is in its files, which a training compares itself."""

    kind: Literal["bpe", "char", "word"] = option("bpe", goes_on=True)
    """Unit that is one token."""
    vocab_size: int = option(500, at_least=3, goes_on=True)
    """Number of BPE tokens, blank and <unk> included; char and word take what the text has, up to this."""
    byte_fallback: bool = option(False, goes_on=True)
    """Spell characters that the training text lacks as UTF-8 bytes (bpe and char)."""
    case: Literal["keep", "lower", "upper"] = option("keep", goes_on=True)
    """Letter case of every transcript."""
    normal_form: Literal["nfc", "nfkc"] = option("nfc", goes_on=True)
    """Unicode form of every transcript; nfkc also makes full-width letters and digits plain ones."""
    strip_punctuation: bool = option(False, goes_on=True)
    """Take punctuation out of every transcript: not the apostrophe inside a word, the comma inside a number, % or &."""


@dataclass(frozen=True)
class DataConfig:
    speed_factors: tuple[float, ...] = option((0.9, 1.0, 1.1), at_least=0.5, at_most=2.0)
    """Training copies with perturbed speed; 1.0 alone turns it off."""
    random_speed: bool = False
    """An epoch has one copy of each utterance, drawn anew, instead of all: it is as many times shorter."""
    min_duration: float = option(0.0, at_least=0, goes_on=True)
    """Shortest utterance in seconds; shorter ones are quarantined, and always those that have no encoder frame."""
    max_duration: float = option(30.0, at_least=0.1, may_be_infinite=True, goes_on=True)
    """Longest utterance in seconds; longer ones are quarantined."""
    max_quarantine_share: float = option(0.05, at_least=0, at_most=1, goes_on=True)
    """Stop when more than this share of a split's utterances had to be set aside."""
    batch_duration: float = option(200.0, at_least=0.1, may_be_infinite=True)
    """Seconds of audio in one training batch, padding included."""
    num_buckets: int = option(10, at_least=1)
    """Duration buckets of the sampler."""
    sorted_epochs: int = option(0, at_least=0)
    """First epochs that go from short to long batches instead of a random order (SortaGrad, 1512.02595)."""
    num_workers: int = option(0, at_least=0, goes_on=True)
    """Loader processes; 0 loads in the training process."""


@dataclass(frozen=True)
class AugmentConfig:
    num_time_masks: int = option(10, at_least=0)
    """SpecAugment: at most this many time masks per utterance."""
    time_mask_frames: int = option(100, at_least=0)
    """SpecAugment: longest time mask in 10 ms frames."""
    max_time_mask_share: float = option(0.15, at_least=0, at_most=1)
    """SpecAugment: at most this share of an utterance's frames under all time masks together."""
    num_freq_masks: int = option(2, at_least=0)
    """SpecAugment: frequency masks per utterance."""
    freq_mask_bins: int = option(27, at_least=0)
    """SpecAugment: widest frequency mask in mel bins."""
    time_warp_frames: int = option(0, at_least=0)
    """SpecAugment: largest shift of the time warp in 10 ms frames; 0 turns it off."""
    share: float = option(0.9, at_least=0, at_most=1)
    """Share of training utterances that SpecAugment touches."""
    vtlp_factor: tuple[float, float] = option((1.0, 1.0), at_least=0.5, at_most=2.0)
    """Vocal tract length perturbation: least and largest factor of the frequencies, drawn anew in each epoch."""
    noise_share: float = option(0.5, at_least=0, at_most=1)
    """Share of training utterances that get noise, drawn anew in each epoch; without noise (--noise-dir) none does."""
    noise_snr_db: tuple[float, float] = option((10.0, 20.0), at_least=-40, at_most=80)
    """Lowest and highest ratio of speech to noise in dB, drawn uniformly for each utterance."""
    recombine_share: float = option(0.0, at_least=0, at_most=1)
    """Share of training utterances that become new ones, drawn anew in each epoch: pieces of one to three words out of
    other training utterances, with their texts (2502.14685, 2104.01393); wants `train --alignment`."""
    recombine_voices: Literal["same", "any"] = "same"
    """Source of the words: the utterance's speaker at its speed, or every speaker."""
    carry_over_share: float = option(0.0, at_least=0, at_most=1)
    """Share of training utterances whose predictor begins with the last labels of another, drawn anew in each epoch:
    sherpa-onnx's greedy search keeps labels behind an endpoint. For predictors with a context of labels."""
    rir_share: float = option(0.3, at_least=0, at_most=1, goes_on=True)
    """Share of training copies put into a room in stage 1; without room impulse responses (--rir-dir) none is."""


@dataclass(frozen=True)
class EncoderConfig:
    kind: str = "conformer"
    """Name of the encoder in models/encoder.py's ENCODERS."""
    num_layers: int = option(12, at_least=1)
    """Layers."""
    num_heads: int = option(4, at_least=1)
    """Attention heads; d_model / num_heads must be even (rotary positions)."""
    feedforward_dim: int = option(1024, at_least=1)
    """Hidden size of both feed-forward modules."""
    kernel_size: int = option(15, at_least=1)
    """Frames under the depthwise convolution, odd."""
    convolution: Literal["left", "centred"] = "left"
    """left sees the past only; centred (non-causal encoder only) looks both ways inside its block."""
    dropout: float = option(0.1, at_least=0, at_most=0.9)
    """Dropout after every module."""


@dataclass(frozen=True)
class PredictorConfig:
    kind: Literal["lstm", "stateless", "tied_reduced"] = "tied_reduced"
    """Long memory, the last N labels, or those with the joiner's output matrix as embedding (2109.07513)."""
    context_size: int = option(5, at_least=1)
    """Last labels N that stateless and tied_reduced predictors see."""
    num_heads: int = option(4, at_least=1)
    """Heads H of the tied_reduced predictor."""
    embedding_dim: int = option(512, at_least=1)
    """Embedding size of lstm and stateless (tied_reduced: joiner_dim, because the matrix is shared)."""
    hidden_dim: int = option(512, at_least=1)
    """Hidden size of the lstm."""
    num_layers: int = option(1, at_least=1)
    """Layers of the lstm."""
    dropout: float = option(0.1, at_least=0, at_most=0.9)
    """Dropout on the predictor's output."""


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = option(256, at_least=2)
    """Width of both encoders."""
    subsampling_channels: int = option(64, at_least=1)
    """Channels of the two stride-2 convolutions in front."""
    causal: EncoderConfig = EncoderConfig()
    """The deep causal encoder."""
    noncausal: EncoderConfig = EncoderConfig(num_layers=3, convolution="centred")
    """The shallow non-causal encoder on top of it."""
    predictor: PredictorConfig = PredictorConfig()
    """The predictor both passes share."""
    joiner_dim: int = option(512, at_least=1)
    """Width D of the joiner both passes share."""


@dataclass(frozen=True)
class ContextConfig:
    chunk_frames: tuple[int, ...] = option((4, 8, 16, 32), at_least=1)
    """Causal chunks C drawn per batch."""
    left_chunks: tuple[int, ...] = option((4, 8, 16, -1), at_least=1, or_all=True)
    """Left contexts L in chunks, drawn per batch; -1 means all."""
    block_chunks: tuple[int, ...] = option((1, 2, 4, -1), at_least=1, or_all=True)
    """Look-ahead blocks B in chunks, drawn per batch; -1 (the whole utterance) must be among them."""


@dataclass(frozen=True)
class LossConfig:
    backend: Literal["auto", "torch", "numba", "k2"] = "auto"
    """Package that sums over lattices: auto is numba on CPUs where it works, else torch; k2 must be installed. They
    agree but for the last digits, and those make another training: it starts over."""
    prune_range: int = option(5, at_least=2)
    """Symbols R per frame inside the pruned lattice."""
    lm_scale: float = option(0.25, at_least=0, at_most=1)
    """Share of the prediction-only log-probs in the smoothed simple loss."""
    am_scale: float = option(0.0, at_least=0, at_most=1)
    """Share of the acoustic-only log-probs in the smoothed simple loss."""
    simple_scale: float = option(0.5, at_least=0)
    """Weight of the simple loss after the warm-up; it starts at 1."""
    warmup_steps: int = option(500, at_least=0)
    """Steps over which simple falls from 1 to simple_scale and pruned rises from 0.1 to 1."""
    rnnt_type: Literal["regular", "modified", "constrained"] = "regular"
    """Transducer topology."""
    delay_penalty: float = option(0.0, at_least=0)
    """Reward for early symbols of the causal pass after the warm-up (2211.00490), 0.0015 to 0.01."""
    causal_weight: float = option(0.5, at_least=0, at_most=1)
    """Weight w_s of the causal pass; the non-causal pass has 1 - w_s."""
    pass_sampling: bool = False
    """Draw one pass per batch with probability causal_weight instead of computing both (2010.14606)."""
    ctc_scale: float = option(0.0, at_least=0)
    """Weight of an auxiliary CTC loss on each pass's encoder output."""


@dataclass(frozen=True)
class DistillationConfig:
    weight: float = option(1.0, at_least=0)
    """Weight of the KL to the teacher, which is a mean per pass over the lattice cells (see cell_weight)."""
    kind: Literal["pruned", "collapsed", "one_best"] = "pruned"
    """pruned (all V) | collapsed (next label, blank, rest) | one_best (cells on the teacher's best path)."""
    ranges: Literal["teacher", "student"] = "teacher"
    """Model whose prune ranges choose the cells."""
    cell_weight: Literal["uniform", "teacher_occupancy"] = "teacher_occupancy"
    """Weight of the cells in the mean."""
    temperature: float = option(1.0, at_least=0.001)
    """Softmax temperature of both distributions."""
    init_from_teacher: bool = True
    """Start from evenly chosen teacher layers and the parts of equal shape."""


@dataclass(frozen=True)
class MwerConfig:
    """Minimum word error rate training (1712.01818, 2106.02302) of a trained model: `train --init-from`."""

    loss_scale: float = option(0.05, at_least=0)
    """Weight of all other terms, the transducer loss first, beside the expected word errors; 0.01 to 0.1."""
    nbest: int = option(4, at_least=2)
    """Hypotheses of an utterance, at most mwer.beam; their probabilities are made to sum to 1."""
    beam: int = option(4, at_least=2)
    """Beam of the search that finds them."""
    hypotheses: Literal["own", "full"] = "own"
    """Source of the hypotheses: each pass's own search, or the full pass's for both."""


@dataclass(frozen=True)
class TrainingConfig:
    num_epochs: int = option(30, at_least=1, goes_on=True)
    """Passes over the training data (every speed copy counts as data); more of them train on, fewer stay."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """muon: the encoders' matrices by Muon, everything else by AdamW; adamw: everything by AdamW."""
    learning_rate: float = option(1e-3, at_least=0)
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = option(0.02, at_least=0)
    """Peak learning rate of Muon."""
    warmup_steps: int = option(500, at_least=0)
    """Steps of linear warm-up; then cosine decay to final_lr_share."""
    final_lr_share: float = option(0.05, at_least=0, at_most=1)
    """Learning rate at the last step as a share of the peak."""
    weight_decay: float = option(0.01, at_least=0)
    """Decoupled weight decay of matrices; vectors have none."""
    beta2: float = option(0.98, at_least=0, below=1)
    """AdamW's second-moment decay."""
    precision: Literal["float32", "bfloat16", "auto"] = option("float32", goes_on=True)
    """Of the networks' products in training; weights, their gradients, losses and dev losses are float32. bfloat16 is
    faster on GPUs from Ampere on and CPUs with AVX512-BF16 or AMX, slower on others; auto: where it is faster."""
    max_grad_norm: float = option(5.0, at_least=0, may_be_infinite=True)
    """Gradients are clipped to this norm."""
    max_bad_steps: int = option(20, at_least=1, goes_on=True)
    """Steps in a row without finite losses and gradients, all skipped, after which training goes back to its last
    checkpoint with half the learning rate, once; the next time it ends with an error."""
    average_last: int = option(5, at_least=1, goes_on=True)
    """The final model averages this many last epochs; with another value it is averaged anew."""
    keep_epochs: int = option(10, at_least=1, goes_on=True)
    """Epoch checkpoints kept on disk; at least average_last."""
    log_every_steps: int = option(20, at_least=1, goes_on=True)
    """Steps between log lines and TensorBoard points."""
    save_every_minutes: float = option(5.0, at_least=0, may_be_infinite=True, goes_on=True)
    """Minutes between resumable checkpoints inside an epoch."""
    validate_every_epochs: int = option(1, at_least=1, goes_on=True)
    """Epochs between dev losses."""


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Values that a model carries for every program that decodes it; training writes them into its models, and does not
    use them."""

    blank_penalty: float = option(0.0, unbounded="a negative one favours blanks", goes_on=True)
    """Subtracted from the blank's logit by every search; chosen on dev, where a young model leaves words out."""
    ngram: str | None = option(None, goes_on=True)
    """Language model over the model's tokens, from train_ngram (.arpa, .arpa.gz, .npz); the path is relative to the
    model's own folder."""
    lm_scale: float = option(0.0, at_least=0, goes_on=True)
    """Weight of the n-gram's log-probabilities; 0: it is not used."""
    lodr: str | None = option(None, goes_on=True)
    """As ngram: a low-order model, mostly a bigram, of the training transcripts, which is subtracted (2203.16776)."""
    lodr_scale: float = option(0.0, at_least=0, goes_on=True)
    """Weight with which it is subtracted; 0: it is not used."""
    hotwords: str | None = option(None, goes_on=True)
    """File of phrases that searches prefer, one a line, perhaps with a boost (`new york :2.5`); a path as in ngram."""
    hotword_scale: float = option(0.5, at_least=0.01, goes_on=True)
    """Boost of a phrase that names none."""
    confidence_slope: float = option(1.0, at_least=0, goes_on=True)
    """A word's confidence c becomes logistic(slope logit(c) + offset); cascade.bin.calibrate finds both on dev."""
    confidence_offset: float = option(0.0, at_least=-100, goes_on=True)
    """The offset of the same map; 0 with a slope of 1 leaves confidences as they are."""

    def beside(self, folder: Path) -> "DecodingConfig":
        """The same with paths that count from the current folder, for a model in `folder`."""
        return replace(self, **{name: str(folder / path) for name in DECODING_FILES if (path := getattr(self, name))})


DECODING_FILES = ("ngram", "lodr", "hotwords")
"""Options of the decoding section that are paths."""


@dataclass(frozen=True)
class Config:
    seed: int = option(42, at_least=0)
    """Seed of every random draw."""
    features: FeatureConfig = FeatureConfig()
    tokens: TokenConfig = TokenConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    context: ContextConfig = ContextConfig()
    loss: LossConfig = LossConfig()
    distillation: DistillationConfig | None = None
    """Present: the model is a student and the trainer wants --teacher."""
    mwer: MwerConfig | None = None
    """Present: training minimises expected word errors and wants --init-from."""
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
