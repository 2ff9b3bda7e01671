import dataclasses
from typing import get_args

import pytest

from cascade.config.load import changed_options, config_from_dict, config_to_dict, load_config, save_config
from cascade.config.options import Config, ConfigError
from cascade.config.rules import FIELDS, limits_of
from cascade.losses import backends, distillation, log_probs


def test_later_files_and_overrides_win(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("training: {num_epochs: 3, learning_rate: 0.1}\nmodel: {causal: {num_layers: 2}}\n")
    two.write_text("training: {num_epochs: 4}\n")
    config = load_config([one, two], ["model.causal.num_layers=5"])
    assert (config.training.num_epochs, config.training.learning_rate) == (4, 0.1)
    assert config.model.causal.num_layers == 5
    assert config.model.noncausal == Config().model.noncausal


def test_a_config_survives_saving_and_checkpoints(tmp_path):
    overrides = ["context.chunk_frames=[4,8]", "distillation.weight=0.3", "data.speed_factors=[1.0]"]
    config = load_config(overrides=overrides)
    assert config_from_dict(config_to_dict(config)) == config
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config


def test_distillation_is_off_until_named_and_can_be_switched_off():
    assert load_config().distillation is None
    assert load_config(overrides=["distillation.kind=one_best"]).distillation.kind == "one_best"
    assert load_config(overrides=["distillation.weight=1", "distillation=null"]).distillation is None


@pytest.mark.parametrize(("override", "message"), [
    ("model.causal.nlayers=3", "there is no option 'model.causal.nlayers', did you mean model.causal.num_layers?"),
    ("modle.d_model=3", "there is no option 'modle', did you mean model?"),
    ("model.causal.num_layers=x", "model.causal.num_layers must be a whole number, got 'x'"),
    ("model.causal.num_layers=2.0", "model.causal.num_layers must be a whole number, got 2.0"),
    ("model.causal.num_layers=true", "model.causal.num_layers must be a whole number, got True"),
    ("training.num_epochs=[1]", "training.num_epochs must be a whole number, got [1]"),
    ("training.beta2=x", "training.beta2 must be a number, got 'x'"),
    ("data.random_speed=2", "data.random_speed must be true or false, got 2"),
    ("data.random_speed=perhaps", "data.random_speed must be true or false, got 'perhaps'"),
    ("decoding.ngram=[1]", "decoding.ngram must be text, got [1]"),
    ("tokens.kind=syllable", "tokens.kind must be one of bpe | char | word, got 'syllable'"),
    ("loss.prune_range=1", "loss.prune_range must be at least 2, got 1"),
    ("model.noncausal.dropout=1.0", "model.noncausal.dropout must be at most 0.9"),
    ("model.causal.kernel_size=4", "model.causal.kernel_size must be odd, got 4"),
    ("model.d_model=30", "must be an even whole number, got 30 / 4"),
    ("context.block_chunks=[2]", "context.block_chunks must include -1"),
    ("context.chunk_frames=[-1]", "context.chunk_frames must hold positive numbers"),
    ("model.causal.convolution=centred", "model.causal.convolution must be one of left"),
    ("augment.vtlp_factor=[1.1,0.9]", "augment.vtlp_factor must be two numbers from 0.5 to 2.0, the lower one first"),
    ("training.blank_penalty=0.5", "training.blank_penalty is called decoding.blank_penalty"),
    ("decoding.blank_penalty=inf", "decoding.blank_penalty must be a finite number, got inf"),
    ("training.beta2=1", "training.beta2 must be less than 1, got 1"),
    ("training.weight_decay=-0.1", "training.weight_decay must be at least 0, got -0.1"),
    ("training.learning_rate=inf", "training.learning_rate must be a finite number, got inf"),
    ("model.predictor.embedding_dim=0", "model.predictor.embedding_dim must be at least 1, got 0"),
    ("seed=2147483648", "seed must be at most 2147483647, got 2147483648"),
    ("loss.backend=cuda", "loss.backend must be one of auto | torch | numba | k2, got 'cuda'"),
    ("tokens.kind=null", "tokens.kind must be one of bpe | char | word, got None"),
    ("context.left_chunks=[0]", "context.left_chunks must hold positive numbers or -1, got (0,)"),
    ("context.chunk_frames=[4294967296]", "context.chunk_frames must hold positive numbers"),
    ("context.chunk_frames=[]", "context.chunk_frames must hold positive numbers, got ()"),
    ("context.chunk_frames=[1.5]", "context.chunk_frames must be a list of whole numbers, got [1.5]"),
    ("data.speed_factors=[1.0,0.4]", "data.speed_factors must hold numbers from 0.5 to 2.0, got (1.0, 0.4)"),
    ("data.speed_factors=[fast]", "data.speed_factors must be a list of numbers, got ['fast']"),
    ("augment.noise_snr_db=[10,90]", "augment.noise_snr_db must be two numbers from -40 to 80, the lower one first"),
    ("augment.noise_snr_db=[10]", "augment.noise_snr_db must be two numbers, got [10]"),
    ("augment.carry_over_share=0.5 model.predictor.kind=lstm", "augment.carry_over_share wants"),
    ("training.keep_epochs=1", "must be at least training.average_last"),
    ("num_epochs", "an override is written section.key=value"),
    ("data.speed_factors=[[1.0]]", "data.speed_factors must be a list of numbers, got [[1.0]]"),
    ("data.speed_factors[0]=1.0", "data.speed_factors must be a list of numbers, got {'0': 1.0}"),
    ("data.speed_factors=null", "data.speed_factors must be a list of numbers, got None"),
    ("model=3", "model must be a section of options, got 3"),
    ("model.causal=[1]", "model.causal must be a section of options, got [1]"),
    ("model=null", "model must be a section of options, got None"),
    ("seed=${nowhere}", "Interpolation key 'nowhere' not found"),
])
def test_a_wrong_option_is_named_with_its_value(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=override.split())
    assert message in str(error.value)


def numeric_options(config, prefix=""):
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from numeric_options(value, f"{name}.")
        elif type(value) in (int, float):
            yield name, value


@pytest.mark.parametrize(("name", "value"), [
    *numeric_options(load_config(overrides=["distillation.weight=1", "mwer.nbest=4"]))
])
def test_every_number_has_bounds_and_is_named_beyond_them(name, value):
    """What no bound holds back ends in the words of some library, or in losses that are not numbers."""
    wrong = ["1099511627776", "-1000000"] if isinstance(value, int) else ["nan", "-1000000.0"]
    for number in wrong[: 1 if name == "decoding.blank_penalty" else 2]:  # a negative one favours blanks
        with pytest.raises(ConfigError, match=name.rpartition(".")[2]):
            load_config(overrides=[f"{name}={number}"])


def test_every_number_has_a_lower_bound_or_says_why_not():
    for name, field in FIELDS.items():
        if {int, float} & {field.type, *get_args(field.type)}:
            limits = limits_of(field)
            assert (limits.at_least is None) == bool(limits.unbounded), name


@pytest.mark.parametrize(("name", "choices"), [
    ("loss.backend", backends.BACKENDS), ("loss.rnnt_type", log_probs.RNNT_TYPES),
    ("distillation.kind", distillation.KINDS),
])
def test_choices_are_those_of_the_code_that_takes_them(name, choices):
    assert get_args(FIELDS[name].type) == tuple(choices)


def test_broken_files_are_named(tmp_path):
    broken, a_list = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("training: [1, 2\n")
    a_list.write_text("- seed: 1\n")
    for path in (broken, a_list, tmp_path / "missing.yaml"):
        with pytest.raises(ConfigError, match=path.name):
            load_config([path])


@pytest.mark.parametrize(("text", "message"), [
    ("seed: 1\nseed: 2\n", "line 2: found duplicate key seed"),
    ("training:\n\tnum_epochs: 1\n", "line 2: found character"),
    ("training.num_epochs: 3\n", "training.num_epochs must stand in its section, as in `training: {num_epochs: ...}`"),
    ("trainings: {}\n", "there is no option 'trainings', did you mean training?"), ("\xff\n", "'utf-8' codec"),
    ("training: {num_epöchs: 3}\n", "there is no option 'training.num_epöchs', did you mean training.num_epochs?"),
])
def test_a_wrong_file_is_one_sentence_with_its_name(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode("latin-1" if "\xff" in text else "utf-8"))
    with pytest.raises(ConfigError) as error:
        load_config([path])
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file_and_a_byte_order_mark_change_nothing(tmp_path):
    path = tmp_path / "some.yaml"
    for text in ("", "# nothing\n", "\ufeffseed: 42\n"):
        path.write_text(text, encoding="utf-8")
        assert load_config([path]) == Config()


def test_a_file_with_an_option_that_moved_says_where_it_is(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("training: {blank_penalty: 0.5}\n")
    with pytest.raises(ConfigError, match=r"old.yaml: .*training.blank_penalty is called decoding.blank_penalty"):
        load_config([path])


def test_every_option_has_a_default_and_a_description():
    import ast
    import inspect

    import cascade.config.options as module

    tree = ast.parse(inspect.getsource(module))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(item) for item in node.decorator_list):
            for item, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign) and node.name != "Config":
                    assert item.value is not None, (node.name, item.target.id)
                    assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), item.target.id


def test_options_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().training.num_epochs = 3


def test_changed_options_are_listed_by_name():
    changes = changed_options(load_config(), load_config(overrides=["training.num_epochs=7"]))
    assert changes == {"training.num_epochs": (Config().training.num_epochs, 7)}


def test_a_checkpoint_of_a_version_that_took_lhotses_fbank_is_read():
    values = config_to_dict(Config())
    values["features"]["extractor"] = "lhotse"
    assert config_from_dict(values) == Config()
    with pytest.raises(ConfigError, match=r"extractor must be one of kaldi-native-fbank \| kaldifeat, got 'lhotse'"):
        load_config(overrides=["features.extractor=lhotse"])


def test_a_checkpoint_with_losses_that_are_gone_is_read():
    values = config_to_dict(Config())
    values["loss"] |= {"pass_kl_scale": 0.3, "pass_kl_kind": "pruned", "pass_kl_shift": 1}
    assert config_from_dict(values) == Config()
    with pytest.raises(ConfigError, match="pass_kl_scale"):
        load_config(overrides=["loss.pass_kl_scale=0.3"])
