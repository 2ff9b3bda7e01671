"""Write train, dev and test manifests of LibriSpeech or its mini set from a copy, or download them first.

A copy holds PART/SPEAKER/CHAPTER/ID.flac and SPEAKER-CHAPTER.trans.txt, a line `ID TEXT` each, PART being
train-clean-100, dev-other and so on, here or in a folder LibriSpeech. One test part makes test.jsonl, several make one
manifest each, named after the part; without any, the dev parts are the test set too.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.corpus.download import download, download_archive
from cascade.corpus.manifests import Utterance, write_about, write_manifest

URL = "https://www.openslr.org/resources"
MINI_GB = {"train-clean-5": 0.4, "dev-clean-2": 0.2}
CLEAN_100_GB = {"train-clean-100": 6.5, "dev-clean": 0.4, "test-clean": 0.4}
FULL_GB = CLEAN_100_GB | {"train-clean-360": 23.5, "train-other-500": 31.0, "dev-other": 0.4, "test-other": 0.4}
SETS = {"full": FULL_GB, "clean-100": CLEAN_100_GB, "mini": MINI_GB}
"""Parts of each choice, with the size of their archive, which is about that of their files too."""
# OpenSLR's sums (resources/12, 17 and 31), as PaddleSpeech's dataset/{librispeech,musan,mini_librispeech} quote them;
# WeSpeaker's examples/voxceleb/v2/local/download_data.sh has the same one for MUSAN.
MD5 = {
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
    "train-clean-5": "5df7d4e78065366204ca6845bb08f490",
    "dev-clean-2": "6d7ab67ac6a1d2c993d050e16d61080d",
    "musan": "0c472d4fc0c5141eca47ad1ffeb2a7df",
}
SUFFIXES = (".flac", ".opus", ".wav")

log = logging.getLogger(__name__)


def download_parts(parts: dict[str, float], download_dir: Path) -> dict[str, Path]:
    """Fetch the parts that are not there yet; an archive goes once it is unpacked."""
    missing = {part: size for part, size in parts.items() if not (download_dir / part).is_dir()}
    download_dir.mkdir(parents=True, exist_ok=True)
    there = [path for part in missing for path in download_dir.glob(f"{part}.tar*") if path.suffix != ".damaged"]
    free, needed = shutil.disk_usage(download_dir).free / 1e9, sum(missing.values()) + max(missing.values(), default=0)
    needed = max(0.0, needed - sum(path.stat().st_size for path in there) / 1e9)  # fetched by an earlier run
    if free < needed:
        raise OSError(
            f"{download_dir} has {free:.1f} GB of free space, {', '.join(missing)} need {needed:.1f}: make space, "
            "choose --mini or use --corpus-dir DIR"
        )
    folders = {}
    for part in parts:
        number = 31 if part in MINI_GB else 12
        url = f"{URL}/{number}/{part}.tar.gz"
        folders[part] = download_archive(url, download_dir, part, "--corpus-dir DIR", MD5[part]) / part
        (download_dir / f"{part}.tar").unlink(missing_ok=True)
    return folders


def find_parts(corpus: Path, wanted: dict[str, float] | None) -> dict[str, Path]:
    """The folders of the wanted parts, or of all there are; mini parts only where nothing else is of their kind."""
    roots = [corpus / "LibriSpeech", corpus]
    paths = [path for root in roots for kind in ("train", "dev", "test") for path in root.glob(f"{kind}-*")]
    folders = {path.name: path for path in sorted(paths, key=lambda path: path.name) if path.is_dir()}
    for part in wanted or ():
        if part not in folders:
            raise ValueError(f"no {part} in {corpus} ({', '.join(folders) or 'no part at all'}): check --corpus-dir")
    if wanted:
        return {part: folders[part] for part in wanted}
    for kind in ("train", "dev"):
        parts = [name for name in folders if name.startswith(f"{kind}-")]
        if not parts:
            raise ValueError(f"no LibriSpeech in {corpus}: it holds no folder {kind}-*, check --corpus-dir")
        if set(parts) - set(MINI_GB):  # train-clean-5 is a piece of train-clean-100, dev-clean-2 of dev-clean
            folders = {name: path for name, path in folders.items() if name not in MINI_GB or name not in parts}
    return folders


def read_part(folder: Path) -> list[Utterance]:
    """Utterances of a part; what lacks its text or its recording stays in, for the validation to set it aside."""
    utterances, num_transcripts = [], 0
    for chapter in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        transcript = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
        recordings = {path.stem: path for suffix in reversed(SUFFIXES) for path in chapter.glob(f"*{suffix}")}
        texts = dict.fromkeys(recordings, "")
        if transcript.is_file():
            num_transcripts += 1
            lines = transcript.read_text(encoding="utf-8").splitlines()
            texts |= {name: text for name, _, text in (line.partition(" ") for line in lines if line.strip())}
        for name, text in sorted(texts.items()):
            path = recordings.get(name, chapter / f"{name}.flac").resolve()
            utterances.append(Utterance(name, path, text.strip(), chapter.parent.name))
    if not num_transcripts:
        raise ValueError(f"{folder} holds no SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt: it is no part of LibriSpeech")
    return utterances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus-dir", type=Path, metavar="DIR", help="a copy of LibriSpeech or parts of it")
    source.add_argument("--download-dir", type=Path, metavar="DIR", help="download to here what is not there yet")
    source.add_argument("--musan-dir", type=Path, metavar="DIR", help="only download MUSAN's noises to here (11 GB)")
    source.add_argument("--lm-text", type=Path, metavar="FILE", help="only download OpenSLR 11's text to here (1.5 GB)")
    parser.add_argument("--set", choices=SETS, help="default: all of a copy, full for a download")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the manifests")
    arguments = parser.parse_args()
    out = arguments.out
    if arguments.musan_dir:
        url = f"{URL}/17/musan.tar.gz"
        download_archive(url, arguments.musan_dir, "musan", "--noise-dir DIR", MD5["musan"])
        (arguments.musan_dir / "musan.tar").unlink(missing_ok=True)
        return
    if arguments.lm_text:
        download(f"{URL}/11/librispeech-lm-norm.txt.gz", arguments.lm_text)  # OpenSLR has no sum of it; .gz has its own
        return
    if out is None:
        parser.error("--out DIR is needed")
    wanted = SETS.get(arguments.set)
    if arguments.corpus_dir:
        parts = find_parts(arguments.corpus_dir, wanted)
    else:
        parts = download_parts(wanted or FULL_GB, arguments.download_dir)
    train, dev, tests = ([name for name in parts if name.startswith(kind)] for kind in ("train", "dev", "test"))
    splits = {"train": train, "dev": dev}
    splits |= {name: [name] for name in tests} if len(tests) > 1 else {"test": tests or dev}
    for manifest in out.glob("*.jsonl"):
        manifest.unlink()  # of another choice of parts
    for split, names in splits.items():
        log.info("%s: %s", split, ", ".join(names))
        write_manifest(out / f"{split}.jsonl", (utterance for name in names for utterance in read_part(parts[name])))
    write_about(out, f"LibriSpeech, {', '.join(train)}: books read aloud in English", "CC BY 4.0, as LibriSpeech")
    if not tests:
        log.warning("there is no test part: test is %s, as dev", ", ".join(dev))


if __name__ == "__main__":
    run_program(main)
