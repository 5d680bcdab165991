"""The public names."""

import subprocess
import sys

import pytest

import trilobit


@pytest.mark.parametrize("name", trilobit.__all__)
def test_every_public_name_resolves(name: str) -> None:
    """Each name of __all__ is there, documented, and listed by dir()."""
    value = getattr(trilobit, name)
    assert callable(value)
    assert value.__doc__
    assert name in dir(trilobit)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name is an ordinary AttributeError, so that hasattr and doctest tools work."""
    assert not hasattr(trilobit, "ternarise")
    with pytest.raises(AttributeError, match="'trilobit' has no attribute 'ternarise'"):
        _ = trilobit.ternarise


def test_names_resolve_lazily() -> None:
    """Importing the package, and taking errors and configurations from it, loads no torch; taking `load` does."""
    code = (
        "import sys, trilobit; trilobit.TrilobitError, trilobit.TuneConfig, trilobit.EvalConfig, trilobit.GenerateConfig;"
        "assert not {'torch', 'transformers'} & set(sys.modules);"
        "trilobit.TernaryLinear; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
