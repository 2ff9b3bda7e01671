"""The fine-tuning that the tool starts."""

from pathlib import Path

from cascade.config.load import load_config
from cascade.training.run_inputs import RunPaths, check_options
from tools import delay_curve


def test_a_model_of_recombined_utterances_is_fine_tuned_without_an_alignment(tmp_path):
    config = load_config([], ["augment.recombine_share=0.5", *delay_curve._FINE_TUNING])
    check_options(config, RunPaths(tmp_path, tmp_path, tmp_path / "out", init_from=Path("start")))
