"""Low-bit language models: ternary ones, and ones without outliers. Importing this loads no torch: names are lazy."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "TuneConfig": "trilobit.config.tune",
    "PretrainConfig": "trilobit.config.pretrain",
    "EvalConfig": "trilobit.config.eval",
    "QuantizeConfig": "trilobit.config.quantize",
    "GenerateConfig": "trilobit.config.generate",
    "TernarySpec": "trilobit.surgery.ternary",
    "TernaryLinear": "trilobit.nn.ternary",
    "PackedLinear": "trilobit.nn.packed",
    "TrilobitError": "trilobit.errors",
    "ternarize": "trilobit.surgery.ternary",
    "outlier_safe": "trilobit.surgery.outlier_safe",
    "fold": "trilobit.surgery.fold",
    "load": "trilobit.infer.load",
    "open_engine": "trilobit.infer.engine",
}
_COMMANDS = {
    "tune": "trilobit.train.tune",
    "pretrain": "trilobit.train.pretrain",
    "evaluate": "trilobit.measure.evaluate",
    "quantize": "trilobit.report.fourbit",
    "generate": "trilobit.infer.generate",
}

__all__ = list(_PUBLIC) + list(_COMMANDS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _COMMANDS:
        return import_module(_COMMANDS[name]).run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
