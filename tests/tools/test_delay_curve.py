"""The fine-tuning that the tool starts."""

from pathlib import Path

from cascade.config.load import load_config
from cascade.training.run_inputs import RunPaths, check_options
from tools import delay_curve


def test_a_model_of_recombined_utterances_is_fine_tuned_without_an_alignment(tmp_path):
    config = load_config([], ["augment.recombine_share=0.5", *delay_curve._FINE_TUNING])
    check_options(config, RunPaths(tmp_path, tmp_path, tmp_path / "out", init_from=Path("start")))


def test_a_model_without_a_correct_word_has_a_row():
    missing = {f"emission_delay_ms_{key}": None for key in ("mean", "p50", "p90")} | {"word_delay_ms_mean": None}
    row = {"delay_penalty": 0.2, "blank_penalty": 0.0, "wer_streaming": 120.0, "wer_full": 90.0}
    text = delay_curve.write_table([row | missing | {"num_correct_words": 0, "num_words": 7}])
    assert "120.00 %" in text and "- ms" in text and "0 / 7" in text
