"""A corpus never seen runs through every stage at the first try: the recipe that egs/README.md shows, and a table."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cascade.text.normal import split_words
from tests.synthetic import tone
from tests.training.conftest import run

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.d_model=16", "model.subsampling_channels=2", "model.joiner_dim=16", "context.chunk_frames=[2,4]",
    "context.left_chunks=[4]", "context.block_chunks=[2,-1]", "training.warmup_steps=2", "data.batch_duration=20.0",
    *(f"model.{name}.{value}" for name in ("causal", "noncausal")
      for value in ("num_layers=1", "num_heads=2", "feedforward_dim=16", "kernel_size=3")),
]
DECODING = ("--chunk-ms", 160, "--look-ahead-ms", 320, "--threads", 1)


def prepare(script: Path, *words: object) -> None:
    """Run a recipe's local/prepare.py."""
    argv = sys.argv
    sys.argv = [str(script), *map(str, words)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = argv


def run_stages(exp: Path, conf: Path, *overrides: str) -> list[dict]:
    """Stages 0 to 6 and 9 after local/prepare.py, with --quick's options and a smaller model; results.json."""
    data, aligner, teacher, student = (
        [*(file for name in ("data", *model) if (file := conf / f"{name}.yaml").exists()),
         ROOT / "egs" / "quick.yaml", *TINY, *overrides]
        for model in ((), ("teacher", "aligner"), ("teacher",), ("teacher", "student"))
    )
    run("prepare_data", "--manifest-dir", exp / "manifests", "--out", exp / "data", "--config", *data)
    run("compute_features", "--data", exp / "data", "--out", exp / "fbank", "--num-jobs", 1, "--config", *data)
    run("train_tokens", "--data", exp / "data", "--out", exp / "tokens", "--config", *data)
    inputs = ["--data", exp / "fbank", "--tokens", exp / "tokens", "--threads", 1]
    if (conf / "aligner.yaml").exists():
        run("train", *inputs, "--exp-dir", exp / "aligner", "--config", *aligner)
        run("align", "--exp-dir", exp / "aligner", "--manifest", exp / "fbank" / "train_cuts.jsonl.gz", "--mode",
            "streaming", "--threads", 1, "--out", exp / "align")
        inputs += ["--alignment", exp / "align" / "alignment.ctm"]
    run("train", *inputs, "--exp-dir", exp / "teacher", "--config", *teacher)
    run("train", *inputs, "--exp-dir", exp / "student", "--teacher", exp / "teacher", "--config", *student)
    test = exp / "fbank" / "test_cuts.jsonl.gz"
    for model in ("teacher", "student"):
        out = exp / model / "decode" / "streaming-greedy_search"
        run("decode", "--exp-dir", exp / model, "--manifest", test, "--mode", "streaming", "--method", "greedy_search",
            "--out", out, *DECODING)
    run("report", "--exp-dir", exp, "--out", exp)
    assert (exp / "data" / "quarantine.jsonl").read_text() == "", "every recording and transcript is usable"
    return json.loads((exp / "results.json").read_text())


def hypotheses(exp: Path, model: str = "student") -> list[dict]:
    lines = (exp / model / "decode" / "streaming-greedy_search" / "hyps.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_recipe_that_the_readme_shows_runs_at_the_first_try(tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "egs" / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(example.splitlines()) <= 60
    script = tmp_path / "prepare.py"
    script.write_text(example, encoding="utf-8")
    texts = ["Grüße an Zoë, bitte!", "Um 12:30 Uhr – ja?", "„Größe 5,4“, sagt Łukasz.", "Straße 7: 20 % mehr"]
    for index in range(16):
        folder = tmp_path / "corpus" / f"sprecher {index % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        rate = (22050, 44100, 8000)[index % 3]
        samples = tone(1.6, rate, seed=index)
        soundfile.write(folder / f"satz {index}.wav", np.stack([samples, samples], 1) if index % 2 else samples, rate)
        text = texts[index % 4 - index // 8]
        (folder / f"satz {index}.txt").write_text(f"{text}\r\n", encoding="utf-8")
    exp = tmp_path / "exp"
    prepare(script, "--corpus-dir", tmp_path / "corpus", "--out", exp / "manifests")
    # What a user of another corpus sets in a copy of egs/an4.
    rows = run_stages(
        exp, ROOT / "egs" / "an4" / "conf", "tokens.kind=char", "tokens.vocab_size=400", "tokens.byte_fallback=true",
        "tokens.strip_punctuation=true", "tokens.case=lower",
    )
    assert {row["model"] for row in rows} == {"teacher", "student"}
    assert all(row["num_utterances"] == 4 and row["wer"] is not None and row["cer"] is not None for row in rows)
    lines = hypotheses(exp)
    assert {line["ref"] for line in lines} <= {
        "grüße an zoë bitte", "um 12:30 uhr ja", "größe 5,4 sagt łukasz", "straße 7 20 % mehr",
    }
    assert rows[0]["num_words"] == sum(len(line["ref"].split()) for line in lines)
    assert "Character error rate" in (exp / "RESULTS.md").read_text()


def test_a_chinese_table_of_segments_runs_without_any_python(tmp_path, capsys):
    phrases = ["打开音乐。", "关闭 电视！", "今天天气很好", "明天ok吗？", "我们喜欢北京", "请等三小时"]
    lines = ["\ufeffText\tFile\tStart\tEnd"]
    for number in range(4):
        name = f"recording {number}.{('ogg', 'flac', 'mp3', 'wav')[number]}"
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "audio" / name, tone(9.0, 16000, seed=number), 16000)
        for place in range(4):
            lines.append(f"{phrases[(number + place) % 6]}\taudio/{name}\t{2 * place + 0.1}\t{2 * place + 1.7}")
    (tmp_path / "data.tsv").write_text("\r\n".join([*lines, "", ""]), encoding="utf-8")
    exp = tmp_path / "exp"
    recipe = ROOT / "egs" / "tsv"
    prepare(recipe / "local" / "prepare.py", "--tsv", tmp_path / "data.tsv", "--out", exp / "manifests")
    assert json.loads((exp / "manifests" / "about.json").read_text())["data"] == "the table data.tsv"
    rows = run_stages(exp, recipe / "conf")
    references = [line["ref"] for line in hypotheses(exp)]
    assert len(references) == 4 and not any(" " in text.replace(" ok ", "") or "。" in text for text in references)
    assert rows[0]["num_words"] == sum(len(split_words(text)) for text in references) > 4 * 3
    text = (exp / "RESULTS.md").read_text()
    assert text.index("Character error rate") < text.index("Word error rate")
    capsys.readouterr()
    run("transcribe", "--exp-dir", exp / "student", "--json", "--mode", "streaming", *DECODING,
        "--blank-penalty", 8, tmp_path / "audio" / "recording 3.wav")
    found = json.loads(capsys.readouterr().out)
    words = [word for segment in found["segments"] for word in segment["words"]]
    assert words and "".join(word["word"] for word in words) == found["text"].replace(" ", "")
    assert all(0 <= word["start"] < word["end"] <= 9.0 for word in words)


@pytest.mark.parametrize("name", ["tsv"])
def test_a_missing_table_is_named_in_one_sentence(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare(ROOT / "egs" / name / "local" / "prepare.py", "--tsv", tmp_path / "no.tsv", "--out", tmp_path)
    assert re.fullmatch(r"error: table not found: .*no.tsv\n", capsys.readouterr().err)
