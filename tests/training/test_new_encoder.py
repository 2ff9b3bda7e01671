"""What the tests' own encoder gets for its one file and the name in the config: training, export, planning, a start."""

import importlib.util
import json

import pytest
import torch

from cascade.checkpoint import load_file
from cascade.config.load import load_config
from cascade.config.options import ConfigError
from cascade.export.onnx import LOOK_AHEAD, build_graphs, write_files
from cascade.export.parity import graph_differences
from cascade.export.wrappers import Geometry
from cascade.models.build import build_model
from cascade.models.encoder import ENCODERS
from tests.models.convolutional_encoder import ConvolutionalEncoder
from tests.training.conftest import OPTIONS, run

CHOSEN = ["model.causal.kind=convolutional", "model.noncausal.kind=convolutional"]
GEOMETRY = Geometry(chunk_frames=2, block_frames=4, left_frames=6)


@pytest.fixture(scope="module", autouse=True)
def convolutional():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "convolutional", ConvolutionalEncoder)
        yield


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A trained model with three causal layers."""
    exp_dir = tmp_path_factory.mktemp("convolutional") / "model"
    run("train", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", exp_dir, "--threads", 1,
        *OPTIONS, *CHOSEN, "model.causal.num_layers=3", "training.num_epochs=8", "training.learning_rate=1e-2",
        "training.log_every_steps=4", "training.validate_every_epochs=8", "loss.warmup_steps=0", "augment.share=0")
    return exp_dir


def test_it_learns(teacher):
    rows = [json.loads(line) for line in (teacher / "losses.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    for name in ("causal_ctc", "causal_pruned", "noncausal_ctc", "noncausal_pruned"):
        assert rows[-1][name] < 0.9 * rows[0][name], (name, rows[0][name], rows[-1][name])
    first, last = (load_file(teacher / f"epoch-{epoch}.pt")["model"] for epoch in (1, 8))
    assert all(not torch.equal(first[name], last[name]) for name in first if name.startswith("encoder.causal."))


def test_its_exported_files_say_what_it_says(teacher, tmp_path):
    run("export_onnx", "--exp-dir", teacher, "--out", tmp_path / "onnx", "--chunk-ms", 80, "--look-ahead-ms", 160,
        "--left-context-ms", 240)
    checks = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert len(checks["max_difference"]) == 6 and max(checks["max_difference"].values()) < 1e-4
    if importlib.util.find_spec("sherpa_onnx"):
        assert checks["sherpa_onnx"]["num_recordings"] > 0  # it found the same tokens, or there were no files


@pytest.mark.parametrize("causal", ["conformer", "convolutional"])
def test_two_kinds_share_the_states_of_one_graph(causal, tmp_path):
    noncausal = "convolutional" if causal == "conformer" else "conformer"
    kinds = [f"model.causal.kind={causal}", f"model.noncausal.kind={noncausal}", "model.noncausal.kernel_size=9"]
    torch.manual_seed(4)
    model = build_model(load_config(overrides=[*OPTIONS, *kinds]), 9).eval()
    graphs = build_graphs(model, GEOMETRY)
    assert graphs[LOOK_AHEAD].network.shapes["convolution"] == (16, 4 if causal == "convolutional" else 8)
    write_files(graphs, tmp_path, tmp_path, {})
    assert max(graph_differences(tmp_path, model, GEOMETRY).values()) < 1e-4


def test_a_state_without_a_place_in_the_exported_graph_is_named():
    model = build_model(load_config(overrides=[*OPTIONS, *CHOSEN]), 9).eval()
    layout = model.encoder.causal.state_layout(6)
    model.encoder.causal.state_layout = lambda left: [part._replace(name="memory") for part in layout]
    with pytest.raises(ConfigError, match="a state 'memory' cannot be exported"):
        build_graphs(model, GEOMETRY)
    model.encoder.causal.state_layout = lambda left: [part._replace(shape=(8, 2)) for part in layout]
    with pytest.raises(ConfigError, match="different widths"):
        build_graphs(model, GEOMETRY)


def test_it_is_planned_and_a_student_starts_from_its_layers(teacher, train, tmp_path):
    yaml, planned = tmp_path / "teacher.yaml", tmp_path / "student.yaml"
    yaml.write_text((teacher / "config.yaml").read_text().replace("num_layers: 3", "num_layers: 40"))
    run("compress", "--teacher", yaml, "--target", 0.6, "--vocab-size", 9, "--out", planned)
    student = load_config([planned]).model
    assert student.causal.kind == student.noncausal.kind == "convolutional"
    assert 1 < student.causal.num_layers < 40
    options = ["--teacher", teacher, "distillation.weight=1", "training.num_epochs=1"]
    done = train(tmp_path / "student", *options, *CHOSEN, "model.causal.num_layers=2")
    assert "start: causal encoder: copied from the teacher, layers 0 2" in done.stderr
    assert "start: causal encoder's scale: copied from the teacher" in done.stderr
    done = train(tmp_path / "other", *options)
    assert "start: causal encoder: random start (another kind than the teacher's)" in done.stderr


def test_an_encoder_that_does_not_exist_is_named_before_anything_is_written(trained, train, tmp_path):
    done = train(tmp_path / "model", "model.noncausal.kind=zipformer", check=False)
    assert done.returncode == 2 and not (tmp_path / "model").exists()
    assert "model.noncausal.kind must be one of conformer | convolutional, got 'zipformer'" in done.stderr
    done = train(tmp_path / "model", *CHOSEN, "--init-from", trained, check=False)
    assert "trained with other encoders: set model.causal.kind=conformer" in done.stderr
