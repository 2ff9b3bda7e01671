"""The programs. Those for training and for PyTorch's models need packages that decoding exported files does without."""

import os
import sys


def _say_what_is_missing(kind, error, traceback) -> None:
    """A package that a program imports and that is not installed is a sentence, like all that a user can mend."""
    is_package = issubclass(kind, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "cascade"
    if not is_package or os.environ.get("CASCADE_DEBUG"):
        sys.__excepthook__(kind, error, traceback)
        return
    extra = "export" if error.name in ("onnx", "sherpa_onnx") else "train"
    print(
        f"error: this program needs the package {error.name}: run pip install '.[{extra}]' in the repository's folder",
        file=sys.stderr,
    )


sys.excepthook = _say_what_is_missing
