"""Does the consumer read what was trained? In a process of its own: python -m trilobit.export.verification FOLDER.

hf      transformers                against the model                                   check_stock.py
bf16    transformers                against the model without activation quantisation   check_stock.py
gguf    llama.cpp (xllamacpp)       against the model                                   check_llama_cpp.py
native  the engine                  against the model                                   native.py
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from trilobit import errors
from trilobit.errors import TrilobitError, VerificationError
from trilobit.export import llama_cpp, native
from trilobit.export.check import PROBE_WINDOWS, Check, Row, probe_windows
from trilobit.export.check_stock import check_stock
from trilobit.export.verify import Agreement
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded
from trilobit.infer.stored import freeze
from trilobit.listener import Listener
from trilobit.storage import read_json


def verify(model: Path, artefact: Path, to: str, data: str | None, listener: Listener) -> Check:
    """Check what was written to `artefact`. Raises VerificationError if it is another model."""
    listener.note("checking what was written")
    if to == "gguf" and not llama_cpp.available():
        return Check(why_not="llama.cpp is not installed here (pip install 'trilobit[gguf]' brings it as xllamacpp)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {"model": str(model.absolute()), "artefact": str(artefact.absolute()), "to": to, "data": data}
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-W", "ignore", "-m", "trilobit.export.verification", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (folder / "answer.json").exists():
            raise VerificationError(f"the check did not end: {done.stderr[-400:]} Nothing was left behind.")
        answer = read_json(folder / "answer.json")
    if "error" in answer:
        raise getattr(errors, answer["kind"], VerificationError)(answer["error"])
    rows = [Row(row["reader"], row["against"], Agreement(**row["agreement"])) for row in answer.pop("rows")]
    return Check(rows, **answer)


# ── the other process ──


def check(loaded: Loaded, artefact: Path, to: str, data: str | None) -> Check:
    """Whether the consumer of a form reads what was written to a directory as the model it was made from (frozen)."""
    if to == "native":
        return native.check(loaded, artefact, data)
    windows = probe_windows(loaded, data, PROBE_WINDOWS[to])
    if to == "gguf":
        from trilobit.export.check_llama_cpp import check_llama_cpp

        return check_llama_cpp(loaded, next(artefact.glob("*.gguf")), windows)
    return check_stock(loaded, artefact, windows)


def main(folder: Path) -> None:
    request = read_json(folder / "request.json")
    try:
        loaded = load(request["model"])
        freeze(loaded.model)
        answer = asdict(check(loaded, Path(request["artefact"]), request["to"], request["data"]))
    except TrilobitError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
