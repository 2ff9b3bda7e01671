"""run_program: what ends a program, and with which exit code."""

import pytest

from cascade.bin.cli import run_program


def broken_import(cause):
    try:
        raise cause
    except BaseException as error:
        raise ImportError("initialization failed") from error


def packaged(cause):
    try:
        broken_import(cause)
    except ImportError as error:
        raise ImportError("features need a package: pip install it") from error


@pytest.mark.parametrize("importing", [broken_import, packaged])
def test_a_signal_inside_of_an_import_is_an_interruption(importing, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: importing(KeyboardInterrupt()))
    assert ended.value.code == 75 and capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.parametrize("importing", [broken_import, packaged])
def test_a_package_that_cannot_be_imported_is_an_error(importing, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: importing(ModuleNotFoundError("no such module")))
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1
