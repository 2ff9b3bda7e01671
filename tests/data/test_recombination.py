import dataclasses
import itertools

import numpy as np
import pytest
import torch

from cascade.config.options import AugmentConfig, TokenConfig
from cascade.data.alignments import TimedWord, read_ctm, write_ctm
from cascade.data.augment import utterance_generator
from cascade.data.batches import TrainBatches
from cascade.data.recombination import SHORTEST_SHARE, Recombination, join, join_words, word_cuts
from cascade.data.training_utterances import TrainingUtterance
from cascade.text.normal import split_words
from cascade.text.tokens import Tokenizer, train_tokenizer
from tests.synthetic import WORDS, small_config

QUIET, LOUD = -10.0, 5.0


def alike(ours, theirs):
    return [batch.texts for batch in ours] == [batch.texts for batch in theirs] and all(
        torch.equal(one.features, other.features) and torch.equal(one.tokens, other.tokens)
        for one, other in zip(ours, theirs, strict=True)
    )


class Speech:
    """Utterances of a few words in which a word is one loud mel bin, between frames that are quiet.

    Bin len(WORDS) + k is at -1 in all frames of voice k; every utterance has a level of its own.
    """

    def __init__(self, tokenizer, num_utterances=24, num_voices=2):
        draw = np.random.default_rng(0)
        self.utterances, self.features, self.timed, self.gains = [], [], {}, []
        for number in range(num_utterances):
            words, rows, timed = [*draw.choice(WORDS, draw.integers(1, 6))], [], []
            voice = number % num_voices
            self._add(rows, None, draw.integers(6, 20), voice)
            for word in words:
                start = len(rows)
                self._add(rows, word, draw.integers(30, 50), voice)
                timed.append(TimedWord(word, start / 100 + 0.24, start / 100 + 0.28))
                self._add(rows, None, draw.integers(3, 9), voice)
            self._add(rows, None, 5, voice)
            gain = draw.uniform(-2, 2)
            name, text = f"utterance-{number}", " ".join(words)
            self.features.append(np.array(rows, dtype=np.float32) + np.float32(gain))
            self.gains.append(gain)
            tokens = tuple(tokenizer.encode(text))
            self.utterances.append(TrainingUtterance(name, text, tokens, len(rows), None, name, f"voice {voice}"))
            self.timed[name] = timed

    @staticmethod
    def _add(rows, word, count, voice):
        frame = np.full(10, QUIET)
        frame[len(WORDS) + voice] = -1.0
        if word is not None:
            frame[WORDS.index(word)] = LOUD
        rows += [frame] * int(count)

    def words_in(self, features, gain):
        """The words that the frames say, each at the level `gain`."""
        inside = np.abs(features[:, : len(WORDS)].max(axis=1) - LOUD - gain) < 0.01
        said = np.where(inside, features[:, : len(WORDS)].argmax(axis=1), -1)
        return [WORDS[word] for word, _ in itertools.groupby(said) if word >= 0]


@pytest.fixture
def speech(exp):
    return Speech(Tokenizer.load(exp / "tokens"))


def recombination(exp, speech, folder, **options):
    path = folder / "alignment.ctm"
    write_ctm(path, speech.timed)
    config = AugmentConfig(**{"recombine_share": 1.0, **options})
    return Recombination(path, speech.utterances, Tokenizer.load(exp / "tokens"), config, speech.features.__getitem__)


@pytest.mark.parametrize("voices", ["same", "any"])
def test_text_and_frames_of_a_recombined_utterance_say_the_same(voices, exp, speech, tmp_path):
    made, tokenizer = recombination(exp, speech, tmp_path, recombine_voices=voices), Tokenizer.load(exp / "tokens")
    texts, mixed = set(), 0
    for epoch, (index, utterance) in itertools.product(range(6), enumerate(speech.utterances)):
        features, tokens, text = made(index, utterance_generator(1, epoch, utterance.id))
        assert speech.words_in(features, speech.gains[index]) == text.split()
        assert list(tokens) == tokenizer.encode(text)
        assert SHORTEST_SHARE * utterance.num_frames - 1 <= len(features) <= utterance.num_frames
        heard = {int(voice) for voice in features[:, len(WORDS) : len(WORDS) + 2].argmax(axis=1)}
        assert heard == {index % 2} or voices == "any"
        mixed += len(heard) > 1
        texts.add(text)
    assert len(texts) > 3 * len({utterance.text for utterance in speech.utterances})
    assert (mixed > 0) == (voices == "any")


def test_the_share_is_recombined_and_the_rest_stays_as_it_is(exp, speech, tmp_path):
    made, changed = recombination(exp, speech, tmp_path, recombine_share=0.3), 0
    for epoch, (index, utterance) in itertools.product(range(20), enumerate(speech.utterances)):
        features, tokens, text = made(index, utterance_generator(1, epoch, utterance.id))
        if features is speech.features[index]:
            assert (tokens, text) == (utterance.tokens, utterance.text)
        else:
            changed += 1
    assert changed / 20 / len(speech.utterances) == pytest.approx(0.3, abs=0.06)


def test_scripts_mixed_without_spaces_are_recombined_with_theirs(tmp_path):
    texts = ("我要买iphone手机", "call me 现在", "not now")
    tokenizer = train_tokenizer(texts, TokenConfig(kind="char"), tmp_path / "tokens")
    frames = np.full((400, 10), QUIET, dtype=np.float32)
    utterances, timed = [], {}
    for number, text in enumerate(texts):
        words = split_words(text)
        tokens = tuple(tokenizer.encode(text))
        utterances.append(TrainingUtterance(str(number), text, tokens, len(frames), None, str(number), "voice"))
        timed[str(number)] = [TimedWord(word, 0.5 * k + 0.5, 0.5 * k + 0.6) for k, word in enumerate(words)]
    write_ctm(tmp_path / "alignment.ctm", timed)
    config = AugmentConfig(recombine_share=1.0)
    made = Recombination(tmp_path / "alignment.ctm", utterances, tokenizer, config, lambda index: frames)
    found = [made(index, utterance_generator(1, epoch, str(index)))[1:] for epoch in range(30) for index in range(3)]
    said = {text for _, text in found}
    assert len(said) > 10 and all(list(tokens) == tokenizer.encode(text) for tokens, text in found)
    known = {word for text in texts for word in split_words(text)}
    assert {word for text in said for word in split_words(text)} <= known
    assert any("买iphone" in text for text in said) and not any("买 iphone手" in text for text in said)


def test_words_are_joined_with_their_spaces_and_never_into_one():
    assert join_words([" 买", "iphone", "手", " now"]) == "买iphone手 now"
    assert join_words([" call", "iphone", " me", "在"]) == "call iphone me在"


def test_words_are_cut_where_it_is_quiet_before_they_are_said(speech):
    for utterance, features in zip(speech.utterances, speech.features, strict=True):
        words = speech.timed[utterance.id]
        cuts = word_cuts(words, features)
        loud = features[:, : len(WORDS)].max(axis=1) > 0
        for first, end, word in zip(cuts[:-1], cuts[1:], words, strict=True):
            assert abs(first - (round(word.start * 100) - 24)) < 10 and first < word.start * 100 < end
            said = features[first:end, : len(WORDS)][loud[first:end]]
            assert len(said) >= 30 and (said.argmax(axis=1) == WORDS.index(word.word)).all()


def test_an_utterance_without_room_for_its_words_is_left_as_it_is(exp, speech, tmp_path):
    utterance = next(utterance for utterance in speech.utterances if len(utterance.text.split()) > 3)
    end = utterance.num_frames / 100
    words = utterance.text.split()
    speech.timed[utterance.id] = [TimedWord(word, end - 0.05 + place / 100, end) for place, word in enumerate(words)]
    index = speech.utterances.index(utterance)
    made = recombination(exp, speech, tmp_path)
    assert made(index, utterance_generator(1, 1, utterance.id))[0] is speech.features[index]


def test_the_frames_at_a_joint_are_mixed_by_energy():
    one, other = np.full((3, 4), 2.0, dtype=np.float32), np.full((5, 4), -1.0, dtype=np.float32)
    joined = join([one, other])
    assert (joined[:2] == 2).all() and (joined[4:] == -1).all() and len(joined) == 8
    assert np.allclose(np.exp(joined[2]), 0.75 * np.exp(2) + 0.25 * np.exp(-1))
    assert np.allclose(np.exp(joined[3]), 0.75 * np.exp(-1) + 0.25 * np.exp(2))


@pytest.fixture
def aligned(exp, tmp_path):
    """An alignment of the tiny corpus that spreads the words evenly, and a config that uses it."""
    config = small_config()
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, recombine_share=0.7))
    plain = TrainBatches(exp / "fbank" / "train_cuts.jsonl.gz", Tokenizer.load(exp / "tokens"), small_config())
    timed = {}
    for utterance in plain.utterances:
        step = utterance.num_frames / 100 / (len(utterance.text.split()) + 1)
        timed[utterance.id] = [TimedWord(word, step * (place + 1), step * (place + 1) + 0.04)
                          for place, word in enumerate(utterance.text.split())]
    write_ctm(tmp_path / "alignment.ctm", timed)
    return tmp_path / "alignment.ctm", config


def batches(exp, alignment, config, epoch=2, skip=0, **options):
    made = TrainBatches(exp / "fbank" / "train_cuts.jsonl.gz", Tokenizer.load(exp / "tokens"), config,
                        alignment=alignment, **options)
    made.set_epoch(epoch)
    return list(made.iterate(skip))


def test_recombined_batches_depend_on_seed_epoch_and_id_only(exp, aligned):
    alignment, config = aligned
    whole = batches(exp, alignment, config)
    assert alike(batches(exp, alignment, config), whole)
    assert alike(batches(exp, alignment, config, skip=3), whole[3:])
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    assert alike(batches(exp, alignment, workers), whole)
    texts = {name: text for batch in whole for name, text in zip(batch.ids, batch.texts, strict=True)}
    shared = {name: text for rank in range(2) for batch in batches(exp, alignment, config, rank=rank, world_size=2)
              for name, text in zip(batch.ids, batch.texts, strict=True)}
    assert shared == texts
    other = {name: text for batch in batches(exp, alignment, config, epoch=3)
             for name, text in zip(batch.ids, batch.texts, strict=True)}
    assert other != texts and other.keys() == texts.keys()


def test_an_alignment_of_something_else_is_an_error_that_names_the_remedy(exp, aligned):
    alignment, config = aligned
    timed = read_ctm(alignment)
    name, words = next((name, words) for name, words in timed.items() if len(words) > 1)
    remedy = "run align again, with --manifest EXP/fbank/train_cuts.jsonl.gz"
    wrong = (
        ({name: words[1:]}, f"{name} is '{words[1].word}"),
        ({name: [*words[:-1], dataclasses.replace(words[-1], end=9.0)]}, f"{name} ends at 9.00 s"),
        (None, "has 1 of 26 training utterances"),
    )
    for changes, message in wrong:
        write_ctm(alignment, {name: words} if changes is None else timed | changes)
        with pytest.raises(ValueError, match=message) as error:
            batches(exp, alignment, config)
        assert remedy in str(error.value)
