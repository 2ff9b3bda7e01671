"""Every option of an experiment, as frozen dataclasses with a string below each field that documents it.

Lengths of chunks, blocks and contexts are in 40 ms encoder frames unless the name carries a unit.
A new option also goes into one of the tables of `config.rules`: does another value make another training?
"""

from __future__ import annotations

from dataclasses import dataclass, field

FRAME_SHIFT_MS = 10
SUBSAMPLING = 4
ENCODER_FRAME_MS = FRAME_SHIFT_MS * SUBSAMPLING


class ConfigError(ValueError):
    """A wrong option: the message names the option, its value and the remedy. Programs exit with 2."""


@dataclass(frozen=True)
class FeatureConfig:
    sampling_rate: int = 16000
    """Hz; recordings at another rate are resampled."""
    num_mel_bins: int = 80
    """Mel bins F of the Kaldi-style log-mel fbank (25 ms window, 10 ms shift)."""
    extractor: str = "lhotse"
    """lhotse | kaldifeat: computes the fbank of whole files, equally; tools/install_kaldifeat.sh builds the latter."""


@dataclass(frozen=True)
class TokenConfig:
    kind: str = "bpe"
    """bpe | char | word: what one token is."""
    vocab_size: int = 500
    """Number of BPE tokens, blank and <unk> included; char and word take what the text has, up to this."""
    byte_fallback: bool = False
    """Spell characters that the training text lacks as UTF-8 bytes (bpe and char)."""
    case: str = "keep"
    """keep | lower | upper: applied to every transcript."""
    normal_form: str = "nfc"
    """nfc | nfkc: Unicode form of every transcript; nfkc also makes full-width letters and digits plain ones."""
    strip_punctuation: bool = False
    """Take punctuation out of every transcript: not the apostrophe inside a word, the comma inside a number, % or &."""


@dataclass(frozen=True)
class DataConfig:
    speed_factors: tuple[float, ...] = (0.9, 1.0, 1.1)
    """Training copies with perturbed speed; 1.0 alone turns it off."""
    min_duration: float = 0.0
    """Shortest utterance in seconds; shorter ones are quarantined, and always those that have no encoder frame."""
    max_duration: float = 30.0
    """Longest utterance in seconds; longer ones are quarantined."""
    max_quarantine_share: float = 0.05
    """Stop when more than this share of a split's utterances had to be set aside."""
    batch_duration: float = 200.0
    """Seconds of audio in one training batch, padding included."""
    num_buckets: int = 10
    """Duration buckets of the sampler."""
    sorted_epochs: int = 0
    """First epochs that go from short to long batches instead of a random order (SortaGrad, 1512.02595)."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process."""


@dataclass(frozen=True)
class AugmentConfig:
    num_time_masks: int = 10
    """SpecAugment: at most this many time masks per utterance."""
    time_mask_frames: int = 100
    """SpecAugment: longest time mask in 10 ms frames."""
    max_time_mask_share: float = 0.15
    """SpecAugment: at most this share of an utterance's frames under all time masks together."""
    num_freq_masks: int = 2
    """SpecAugment: frequency masks per utterance."""
    freq_mask_bins: int = 27
    """SpecAugment: widest frequency mask in mel bins."""
    time_warp_frames: int = 0
    """SpecAugment: largest shift of the time warp in 10 ms frames; 0 turns it off."""
    share: float = 0.9
    """Share of training utterances that SpecAugment touches."""
    vtlp_factor: tuple[float, float] = (1.0, 1.0)
    """Vocal tract length perturbation: least and largest factor of the frequencies, drawn anew in each epoch."""
    noise_share: float = 0.5
    """Share of training utterances that get noise, drawn anew in each epoch; without noise (--noise-dir) none does."""
    noise_snr_db: tuple[float, float] = (10.0, 20.0)
    """Lowest and highest ratio of speech to noise in dB, drawn uniformly for each utterance."""
    rir_share: float = 0.3
    """Share of training copies put into a room in stage 1; without room impulse responses (--rir-dir) none is."""


@dataclass(frozen=True)
class EncoderConfig:
    kind: str = "conformer"
    """Which encoder: a name in models/encoder.py's ENCODERS."""
    num_layers: int = 12
    """Layers."""
    num_heads: int = 4
    """Attention heads; d_model / num_heads must be even (rotary positions)."""
    feedforward_dim: int = 1024
    """Hidden size of both feed-forward modules."""
    kernel_size: int = 15
    """Frames under the depthwise convolution, odd."""
    convolution: str = "left"
    """left | centred: left sees the past only; centred (non-causal encoder only) looks both ways inside its block."""
    dropout: float = 0.1
    """Dropout after every module."""


@dataclass(frozen=True)
class PredictorConfig:
    kind: str = "tied_reduced"
    """lstm | stateless | tied_reduced."""
    context_size: int = 5
    """Last labels N that stateless and tied_reduced predictors see."""
    num_heads: int = 4
    """Heads H of the tied_reduced predictor."""
    embedding_dim: int = 512
    """Embedding size of lstm and stateless (tied_reduced: joiner_dim, because the matrix is shared)."""
    hidden_dim: int = 512
    """Hidden size of the lstm."""
    num_layers: int = 1
    """Layers of the lstm."""
    dropout: float = 0.1
    """Dropout on the predictor's output."""


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = 256
    """Width of both encoders."""
    subsampling_channels: int = 64
    """Channels of the two stride-2 convolutions in front."""
    causal: EncoderConfig = field(default_factory=EncoderConfig)
    """The deep causal encoder."""
    noncausal: EncoderConfig = field(default_factory=lambda: EncoderConfig(num_layers=3, convolution="centred"))
    """The shallow non-causal encoder on top of it."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    """The predictor both passes share."""
    joiner_dim: int = 512
    """Width D of the joiner both passes share."""


@dataclass(frozen=True)
class ContextConfig:
    chunk_frames: tuple[int, ...] = (4, 8, 16, 32)
    """Causal chunks C drawn per batch."""
    left_chunks: tuple[int, ...] = (4, 8, 16, -1)
    """Left contexts L in chunks, drawn per batch; -1 means all."""
    block_chunks: tuple[int, ...] = (1, 2, 4, -1)
    """Look-ahead blocks B in chunks, drawn per batch; -1 (the whole utterance) must be among them."""


@dataclass(frozen=True)
class LossConfig:
    prune_range: int = 5
    """Symbols R per frame inside the pruned lattice."""
    lm_scale: float = 0.25
    """Share of the prediction-only log-probs in the smoothed simple loss."""
    am_scale: float = 0.0
    """Share of the acoustic-only log-probs in the smoothed simple loss."""
    simple_scale: float = 0.5
    """Weight of the simple loss after the warm-up; it starts at 1."""
    warmup_steps: int = 500
    """Steps over which simple falls from 1 to simple_scale and pruned rises from 0.1 to 1."""
    rnnt_type: str = "regular"
    """regular | modified | constrained transducer topology."""
    delay_penalty: float = 0.0
    """Reward for early symbols of the causal pass after the warm-up (2211.00490), 0.0015 to 0.01."""
    causal_weight: float = 0.5
    """Weight w_s of the causal pass; the non-causal pass has 1 - w_s."""
    pass_sampling: bool = False
    """Draw one pass per batch with probability causal_weight instead of computing both (2010.14606)."""
    ctc_scale: float = 0.0
    """Weight of an auxiliary CTC loss on each pass's encoder output."""


@dataclass(frozen=True)
class DistillationConfig:
    weight: float = 1.0
    """Weight of the KL to the teacher, which is a mean over valid lattice cells per pass, times the batch's tokens."""
    kind: str = "pruned"
    """pruned (all V) | collapsed (next label, blank, rest) | one_best (cells on the teacher's best path)."""
    ranges: str = "teacher"
    """teacher | student: whose prune ranges choose the cells."""
    cell_weight: str = "teacher_occupancy"
    """uniform | teacher_occupancy: weight of the cells in the mean."""
    temperature: float = 1.0
    """Softmax temperature of both distributions."""
    init_from_teacher: bool = True
    """Start from evenly chosen teacher layers and the parts of equal shape."""


@dataclass(frozen=True)
class TrainingConfig:
    num_epochs: int = 30
    """Passes over the training data (every speed copy counts as data)."""
    optimizer: str = "adamw"
    """muon (the encoders' matrices by Muon, everything else by AdamW) | adamw."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon."""
    warmup_steps: int = 500
    """Steps of linear warm-up; then cosine decay to final_lr_share."""
    final_lr_share: float = 0.05
    """Learning rate at the last step as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors have none."""
    beta2: float = 0.98
    """AdamW's second-moment decay."""
    max_grad_norm: float = 5.0
    """Gradients are clipped to this norm."""
    max_bad_steps: int = 20
    """Steps in a row without finite losses and gradients, all skipped, after which training goes back to its last
    checkpoint with half the learning rate, once; the next time it ends with an error."""
    average_last: int = 5
    """The final model averages this many last epochs."""
    keep_epochs: int = 10
    """Epoch checkpoints kept on disk; at least average_last."""
    log_every_steps: int = 20
    """Steps between log lines and TensorBoard points."""
    save_every_minutes: float = 5.0
    """Minutes between resumable checkpoints inside an epoch."""
    validate_every_epochs: int = 1
    """Epochs between dev losses."""


@dataclass(frozen=True)
class DecodingConfig:
    """What decodes a model takes these values from the model; training does not know them."""

    blank_penalty: float = 0.0
    """Subtracted from the blank's logit by every search; chosen on dev, where a young model leaves words out."""


@dataclass(frozen=True)
class Config:
    seed: int = 42
    """Seed of every random draw."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distillation: DistillationConfig | None = None
    """Present: the model is a student and the trainer wants --teacher."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
