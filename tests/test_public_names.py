"""``import lmcore``: the public names are there, are found without importing torch first, and explain themselves."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lmcore

NAMES = [name for name in lmcore.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_found_in_the_module_that_defines_it(name: str) -> None:
    found = getattr(lmcore, name)
    assert found.__name__ == name
    assert inspect.getdoc(found)
    assert name in dir(lmcore)


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'BlockDatasets'"):
        lmcore.BlockDatasets  # noqa: B018


@pytest.mark.parametrize(
    "program",
    [
        "import lmcore; dir(lmcore); lmcore.RequestError; lmcore.RunConfig; lmcore.Duration; lmcore.parse",
        "from lmcore.cli.main import main; main(['--help']); main(['doctor', '--help']) if False else None",
        "import sys; sys.argv = ['x', '--help']; from lmcore.run.start import parse_or_exit; parse_or_exit()",
    ],
)
def test_import_and_help_do_not_import_torch(program: str) -> None:
    check = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'transformers', 'accelerate', 'deepspeed'}"
        " & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", check + program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
