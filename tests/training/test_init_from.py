"""--init-from: what is taken from a trained model, what starts at random, what is refused."""

import re

import pytest
import torch

from cascade.checkpoint import load_file
from cascade.config.load import load_config
from cascade.models.build import build_model
from cascade.text.tokens import BLANK, UNKNOWN, Tokenizer, train_tokenizer
from cascade.training.run_inputs import load_teacher
from cascade.training.start import SYMBOL_ROWS, from_checkpoint, read_source, shared_rows
from tests.training.conftest import OPTIONS, WORDS, run

OTHER_WORDS = ["ONE", "TWO", "THREE", "FIVE", "SIX"]  # FOUR is gone, two are new, and the ids are others


def config_of(*words):
    return load_config([], [*OPTIONS, *words])


def tokenizer_of(folder, words, kind="word"):
    return train_tokenizer(words, config_of(f"tokens.kind={kind}", "tokens.vocab_size=60").tokens, folder)


def fresh(config, tokenizer, seed=99):
    torch.manual_seed(seed)
    return build_model(config, tokenizer.vocab_size)


def started(trained, tokenizer, *words):
    """(model, the same model before, log lines) of a start from `trained`."""
    config = config_of(*words)
    source = read_source(trained, config)
    model, before = fresh(config, tokenizer), fresh(config, tokenizer)
    return model, before, "\n".join(from_checkpoint(model, source, tokenizer, config))


@pytest.mark.parametrize("kind", ["lstm", "stateless", "tied_reduced"])
def test_the_rows_that_mean_a_symbol_are_those_that_grow_with_the_vocabulary(kind):
    with torch.device("meta"):
        small, large = (build_model(config_of(f"model.predictor.kind={kind}"), size) for size in (7, 9))
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    grown = {name for name, tensor in large.state_dict().items() if tensor.shape != shapes[name]}
    assert grown == {name for name in shapes if name.startswith(SYMBOL_ROWS)}
    assert all(shapes[name][0] == 7 for name in grown)


def test_with_the_same_vocabulary_the_start_is_the_trained_model(trained, corpus):
    model, _, lines = started(trained, Tokenizer.load(corpus / "tokens"))
    weights = load_file(trained / "averaged.pt")["model"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert "vocabulary: the same" in lines and "random" not in lines
    features, lens = torch.randn(2, 41, 80), torch.tensor([41, 33])
    model.eval()
    reference = build_model(config_of(), model.vocab_size).eval()
    reference.load_state_dict(weights)
    for mode in ("streaming", "full"):
        outputs = [one.encode(features, lens, mode, 2, 4)[0] for one in (model, reference)]
        logits = [one.joiner(out, one.predictor(torch.tensor([[2, 3]]))[:, :1]) for one, out in
                  zip((model, reference), outputs, strict=True)]
        assert torch.equal(*logits)


def test_a_models_blank_penalty_changes_neither_its_weights_nor_what_starts_from_it(trained, train, corpus, tmp_path):
    folder, weights = tmp_path / "model", load_file(trained / "averaged.pt")["model"]
    train(folder, "decoding.blank_penalty=2")
    config = config_of()
    teacher = load_teacher(folder, corpus / "tokens", config)
    model, _, _ = started(folder, Tokenizer.load(corpus / "tokens"))
    for found in (load_file(folder / "averaged.pt")["model"], teacher.state_dict(), model.state_dict()):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


def test_a_new_vocabulary_keeps_the_encoder_and_the_rows_of_known_symbols(trained, corpus, tmp_path):
    tokenizer = tokenizer_of(tmp_path, OTHER_WORDS)
    model, before, lines = started(trained, tokenizer)
    weights, random = load_file(trained / "averaged.pt")["model"], before.state_dict()
    old = Tokenizer.load(corpus / "tokens")
    old_ids = {old.id_to_symbol(index): index for index in range(old.vocab_size)}
    assert tokenizer.vocab_size == len(OTHER_WORDS) + 2 and old.vocab_size == len(WORDS) + 2
    for name, tensor in model.state_dict().items():
        if not name.startswith(SYMBOL_ROWS):
            assert torch.equal(tensor, weights[name]), name
            continue
        for index in range(tokenizer.vocab_size):
            symbol = tokenizer.id_to_symbol(index)
            expected = weights[name][old_ids[symbol]] if symbol in old_ids else random[name][index]
            assert torch.equal(tensor[index], expected), (name, symbol)
    assert model.predictor.embedding is model.joiner.output.weight
    assert "3 of 5 symbols were known and keep their rows, 2 are new; 1 of the checkpoint's are gone" in lines
    assert "output.weight (2 of 7 rows)" in lines and "ctc.causal.weight (2 of 7 rows)" in lines
    match = re.search(r"causal encoder: ([\d,]+) of ([\d,]+) parameters taken$", lines, re.MULTILINE)
    assert match and match[1] == match[2]


def test_a_predictor_whose_symbols_are_mostly_new_starts_at_random(trained, tmp_path):
    model, before, lines = started(trained, tokenizer_of(tmp_path, ["ONE", "SEVEN", "EIGHT"]))
    assert all(torch.equal(*pair) for pair in zip(
        model.predictor.state_dict().values(), before.predictor.state_dict().values(), strict=True,
    ))
    assert re.search(r"predictor: 0 of [\d,]+ parameters taken; random start: all of it .*only 1 of 3", lines)


def test_another_kind_of_token_or_predictor_shares_only_what_means_the_same(trained, corpus, tmp_path):
    characters = tokenizer_of(tmp_path, ["A B", "ONE"], "char")
    assert {characters.id_to_symbol(index) for index in shared_rows(characters, Tokenizer.load(corpus / "tokens"))} == {
        BLANK
    }
    assert UNKNOWN in {characters.id_to_symbol(index) for index in shared_rows(characters, characters)}
    model, before, lines = started(trained, Tokenizer.load(corpus / "tokens"), "model.predictor.kind=stateless")
    assert "predictor: 0 of" in lines and "it is stateless, the checkpoint's is tied_reduced" in lines
    assert torch.equal(model.predictor.out.weight, before.predictor.out.weight)


def test_features_are_normalised_as_the_checkpoint_does(trained, corpus, train, tmp_path):
    torch.save({"mean": torch.full((80,), 5.0), "std": torch.full((80,), 2.0)}, tmp_path / "stats.pt")
    data = tmp_path / "fbank"
    data.mkdir()
    (tmp_path / "stats.pt").rename(data / "stats.pt")
    for split in ("train", "dev"):
        (data / f"{split}_cuts.jsonl.gz").write_bytes((corpus / "fbank" / f"{split}_cuts.jsonl.gz").read_bytes())
    done = run("train", "--data", data, "--tokens", corpus / "tokens", "--exp-dir", tmp_path / "model", "--threads", 1,
               "--init-from", trained, *OPTIONS)
    assert "start: feature normalisation: the checkpoint's" in done.stderr
    weights, other = (load_file(folder / "averaged.pt")["model"] for folder in (tmp_path / "model", trained))
    for name in ("encoder.feature_mean", "encoder.feature_scale"):
        assert torch.equal(weights[name], other[name])


def test_a_resumed_run_does_not_start_again_and_another_checkpoint_is_another_run(trained, train, tmp_path):
    exp_dir = tmp_path / "model"
    options = ["training.num_epochs=3"]
    whole = train(exp_dir, "--init-from", trained, *options)
    assert "start: vocabulary: the same" in whole.stderr
    expected = load_file(exp_dir / "averaged.pt")["model"]
    # As if it had been stopped after the last epoch but before the final model was written.
    (exp_dir / "averaged.pt").unlink()
    again = train(exp_dir, "--init-from", trained, *options)
    assert "resuming" in again.stderr and "start:" not in again.stderr
    weights = load_file(exp_dir / "averaged.pt")["model"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    other = train(exp_dir, "--init-from", trained / "epoch-1.pt", *options)
    assert "starting over" in other.stderr and "start: weights of" in other.stderr
    without = train(exp_dir, *options)
    assert "starting over" in without.stderr and "start:" not in without.stderr


@pytest.mark.parametrize(("words", "message", "code"), [
    (["--init-from", "{tmp}/nowhere"], "no such file", 1),
    (["--init-from", "{tmp}"], "its training has not finished", 1),
    (["--init-from", "{trained}/config.yaml"], "not a checkpoint", 1),
    (["--init-from", "{trained}", "model.d_model=32", "model.causal.num_layers=2"],
     "other encoders: set model.causal.num_layers=1 model.d_model=16", 1),
    (["--init-from", "{trained}", "model.causal.num_heads=1"], "set model.causal.num_heads=2", 1),
    (["--init-from", "{trained}", "features.sampling_rate=8000"], "set features.sampling_rate=16000", 1),
    (["--init-from", "{trained}", "distillation.weight=1", "--teacher", "{trained}"],
     "distillation.init_from_teacher=false", 2),
    (["--init-from", "{tmp}/model/averaged.pt"], "choose another --exp-dir", 2),
    (["distillation.weight=1", "--teacher", "{tmp}/model"], "lies in --exp-dir", 2),
    (["distillation.weight=1", "--teacher", "{tmp}/model/teacher"], "lies in --exp-dir", 2),
    (["distillation.weight=1", "--teacher", "{tmp}"], "lies in --teacher", 2),
    (["--data", "{tmp}/model/fbank"], "--data {tmp}/model/fbank lies in --exp-dir", 2),
    (["--tokens", "{tmp}/model/tokens"], "--tokens {tmp}/model/tokens lies in --exp-dir", 2),
    (["augment.recombine_share=0.5", "--alignment", "{tmp}/model/align/alignment.ctm"], "alignment.ctm lies in", 2),
])
def test_what_cannot_be_started_from_is_refused_in_one_sentence(trained, train, tmp_path, words, message, code):
    words = [word.format(tmp=tmp_path, trained=trained) for word in words]
    done = train(tmp_path / "model", *words, check=False)
    assert done.returncode == code, done.stderr
    assert message.format(tmp=tmp_path) in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()


def test_a_student_starts_from_a_model_while_it_learns_from_a_teacher(trained, train, tmp_path):
    options = ["--init-from", trained, "--teacher", trained, "distillation.init_from_teacher=false"]
    done = train(tmp_path / "model", *options)
    assert "start: vocabulary: the same" in done.stderr and "copied from the teacher" not in done.stderr
