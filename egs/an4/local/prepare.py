"""Write train, dev and test.jsonl of AN4 from a copy of the corpus, or download it first.

The corpus has etc/an4_{train,test}.{fileids,transcription} and wav/<fileid>.{flac,wav,sph}. It has no dev split: the
utterances of eight training speakers make one, so that no dev speaker is heard in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.corpus.download import download_archive
from cascade.corpus.manifests import Utterance, write_about, write_manifest

REVISION = "b567d132f43304e70a2b2eca6077f22255311812"
URL = f"https://github.com/cmusphinx/an4/archive/{REVISION}.tar.gz"
DEV_SPEAKERS = {"ffmm", "fmjd", "mblw", "mdmc", "mjbh", "mmaf", "mrab", "msmn"}


def read_split(corpus: Path, split: str) -> list[Utterance]:
    """The utterances of etc/an4_<split>.*: a file id and a line `<s> TEXT </s> (id)` each, in the same order."""
    if not (corpus / "etc" / f"an4_{split}.fileids").is_file():
        raise ValueError(f"no AN4 in {corpus}: etc/an4_{split}.fileids is missing, check --corpus-dir")
    fileids, transcripts = (
        (corpus / "etc" / f"an4_{split}.{name}").read_text(encoding="utf-8").split("\n")
        for name in ("fileids", "transcription")
    )
    utterances = []
    for fileid, line in zip(filter(None, fileids), filter(None, transcripts), strict=True):
        text, _, name = line.rpartition("(")
        base, speaker = corpus / "wav" / fileid, fileid.split("/")[-2]
        if name.rstrip(")\r ") != base.name:
            raise ValueError(f"an4_{split}: file id {fileid} and transcript {line!r} are not of one utterance")
        files = [base.with_suffix(suffix) for suffix in (".flac", ".wav", ".sph")]
        path = next((file for file in files if file.is_file()), files[0])
        words = [word for word in text.split() if word not in ("<s>", "</s>")]
        utterances.append(Utterance(base.name, path.resolve(), " ".join(words), speaker))
    return utterances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus-dir", type=Path, metavar="DIR", help="a copy of AN4")
    source.add_argument("--download-dir", type=Path, metavar="DIR", help="download AN4 to here, unless it is there")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the manifests")
    arguments = parser.parse_args()
    corpus = arguments.corpus_dir or download_archive(URL, arguments.download_dir, "an4", "--corpus-dir DIR")
    train = read_split(corpus, "train")
    for split, is_dev in (("train", False), ("dev", True)):
        chosen = [utterance for utterance in train if (utterance.speaker in DEV_SPEAKERS) == is_dev]
        write_manifest(arguments.out / f"{split}.jsonl", chosen)
    write_manifest(arguments.out / "test.jsonl", read_split(corpus, "test"))
    write_about(
        arguments.out, "AN4, (c) 1991-2005 Carnegie Mellon University: spelled names and numbers in English",
        "Apache-2.0; AN4 is free for any purpose with its notice",
    )  # fmt: skip


if __name__ == "__main__":
    run_program(main)
