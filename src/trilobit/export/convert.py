"""`trilobit export`: a finished model in the form that an engine reads, checked there before it is given its name.

out/                the files of that form (forms.py, gguf.py, native.py), read from the model tensor by tensor
out/README.md       a model card with the table of the check (card.py)

`--to gguf --out NAME.gguf` writes that one file, with its card in NAME.md beside it.

The check runs in a process of its own (verification.py): writing needs no more memory than the largest matrix, comparing needs
both models. Weights that are quantised on the way (compressed.py) are in memory, and checked there. An artefact that its
consumer reads as another model is not left behind.
"""

import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trilobit.config.export import ExportConfig
from trilobit.errors import ExportError
from trilobit.export import compressed, native
from trilobit.export.card import write_card
from trilobit.export.check import Check
from trilobit.export.foreign import open_source
from trilobit.export.forms import bitnet_obstacle, choose_form, dense_entries
from trilobit.export.hf import write_companions, write_form
from trilobit.export.push import push
from trilobit.export.source import Source, StoredSource
from trilobit.export.verification import verify
from trilobit.infer.engine import require_library
from trilobit.infer.load import locate
from trilobit.listener import SILENT, Listener, timed
from trilobit.storage import atomic_directory, atomic_file, require_new_directory, require_new_file
from trilobit.tensors import stream_tensors


@dataclass(frozen=True)
class ExportResult:
    """What was written: form says in which of its kind's forms, reason why, bytes the weights' size. check: how its consumer's
    reading agrees with the model. url: where it was uploaded to."""

    path: str
    to: str
    form: str
    reason: str
    bytes: int
    seconds: float
    check: Check
    details: dict[str, Any] = field(default_factory=dict)
    url: str | None = None

    def summary(self) -> str:
        lines = [f"{self.path}: {self.form}, {self.bytes / 1e6:,.1f} MB ({self.reason})", "", *self.check.table()]
        return "\n".join(lines + ([f"uploaded to {self.url}"] if self.url else []))


def run(config: ExportConfig, listener: Listener = SILENT) -> ExportResult:
    """Export as configured. Raises ExportError where the target cannot hold the model (with what can), VerificationError where
    its consumer reads another one; nothing is left then."""
    started = time.perf_counter()
    target = Path(config.out)
    alone = config.to == "gguf" and target.suffix == ".gguf"  # one file, not a directory
    name, card = (target.stem, target.with_suffix(".md")) if alone else (target.name, target / "README.md")
    for new in (target, card) if alone else (target,):
        (require_new_file if alone else require_new_directory)(new, "Choose another --out.")
    if config.to == "native":
        require_library()
    if config.to == "gguf" and find_spec("gguf") is None:
        raise ExportError("--to gguf needs the package gguf: pip install 'trilobit[gguf]'.")
    if config.to == "compressed-tensors":
        compressed.require_package()
        compressed.settings_of(config)  # refused before anything is loaded
    place = locate(config.model)
    whole = target.resolve() if target.is_symlink() else target  # to an empty directory, which is replaced, not the link
    with atomic_file(target) if alone else atomic_directory(whole, new=True) as directory:
        if config.to == "compressed-tensors":
            (form, reason, check), details, ternary = compressed.write(config, place, directory, listener), {}, False
        else:
            source = open_source(place, as_stored=config.to == "native")
            ternary = source.plan is not None
            if config.to == "native":
                form, reason, details = native.write(source, directory, config.layout, listener)
            else:
                (form, reason), details = _write(config, source, directory, name, listener), {}
            read = source.directory if isinstance(source, StoredSource) else place  # of a run, what it was really made from
            check = verify(read, directory, config.to, config.data, listener)
        size = sum(f.stat().st_size for f in directory.iterdir() if f.suffix in (".safetensors", ".gguf"))
        found_at = config.push or str(target)
        write_card(directory / card.name, place, name, config.to, form, check, str(config.model), found_at, ternary)
    url = push(target, config.push) if config.push is not None else None
    return ExportResult(
        str(target), config.to, form, reason, size, time.perf_counter() - started, check, details, url
    )  # fmt: skip


def _write(config: ExportConfig, source: Source, directory: Path, name: str, listener: Listener) -> tuple[str, str]:
    """The files of one form, and its name and why that one."""
    if config.to == "gguf":
        from trilobit.export import gguf

        contents = gguf.write(source, directory / f"{name}.gguf", config.type, config.head, listener)
        return f"graph {contents.graph}, type {contents.kind}", contents.reason

    progress = timed(listener, "Writing tensors")
    if source.plan is None:
        if config.form.endswith("bitlinear"):
            raise ExportError(f"--form {config.form} holds ternary weights, and this model is not ternary.")
        stream_tensors(dense_entries(source, "bf16"), directory, each=progress)
        write_companions(directory, source.model, None, source.tokenizer, "full precision", {"dtype": "bfloat16"})
        return "an ordinary checkpoint in bf16", "the model is not ternary"
    if config.to == "hf" and config.form != "dense":
        obstacle = bitnet_obstacle(source)
        if obstacle is None:
            form = choose_form(source)[0] if config.form == "auto" else config.form
            write_form(source, directory, form, "fp32", each=progress)
            return form, "transformers' class holds it exactly"
        if config.form != "auto":
            raise ExportError(f"--form {config.form} cannot hold this model: {obstacle}. Use --to native.")
        reason = f"transformers' ternary classes cannot hold it: {obstacle}"
    else:
        reason = "as asked"
    if normed := [path for path, linear in source.plan.linears.items() if linear.normed]:
        raise ExportError(
            f"an ordinary checkpoint has no norm in front of {normed[0]}"
            + (f", and {reason}" if reason != "as asked" else "")
            + ". Use --to native, or tune with --placement none."
        )
    stream_tensors(dense_entries(source, "bf16"), directory, each=progress)
    write_companions(directory, source.model, source.plan, source.tokenizer, "dense", {"dtype": "bfloat16"})
    return "an ordinary checkpoint of code · scale in bf16", reason
