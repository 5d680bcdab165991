"""Time and memory of each `trilobit export --to`, of a run with random ternary weights, beside their limits.

    python bench/export.py [--size 2b | 200m | tiny] [--form autobitlinear | packed | latent] [--to native hf …] [--out DIR]

The run has BitNet-2B-4T's shapes (2b: a tied embedding of 128,256 rows and 2.08 B ternary weights), no inserted norms, one
scale a matrix; it is written tensor by tensor, and removed at the end. Every export is a process of its own, without its
check: seconds are those of the whole process, CPU those that processors worked for it (on a busy machine the fewer), memory is
the most it had resident, pages of files that it maps included.
Limits, on two cores: 90 s; four times the largest stored tensor and 500 MB.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MOST_SECONDS, TIMES, BEYOND = 90.0, 4, 500e6
SIZES: dict[str, dict[str, int]] = {
    "2b": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 30, "num_attention_heads": 20,
           "num_key_value_heads": 5, "vocab_size": 128256},
    "200m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
}  # fmt: skip
FORMS = ("native", "hf", "gguf", "bf16")


def make(run: Path, size: str, form: str) -> int:
    """Write a run whose model is random; the bytes of its largest tensor."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from trilobit.demo import MODEL
    from trilobit.export.forms import contents_of
    from trilobit.export.hf import write_companions
    from trilobit.export.source import Source
    from trilobit.infer.foreign import sites_of
    from trilobit.infer.stored import PACKED_FILE
    from trilobit.nn.packed import PackedEmbedding, PackedLinear
    from trilobit.storage import atomic_directory, write_json
    from trilobit.surgery.roles import Roles, decoder_layers
    from trilobit.surgery.ternary import TernarySpec, apply_plan, make_plan
    from trilobit.tensors import Entry, stream_tensors

    class Random(Source):
        def packed(self, path: str) -> PackedLinear | PackedEmbedding:
            module: Any = self.ternary[path]
            codes = torch.randint(-1, 2, (module.out_features, module.in_features), dtype=torch.int8)
            return PackedLinear(codes, torch.full((1, 1), 0.02), None, None, "tensor", True)

        def kept(self, name: str) -> torch.Tensor:
            shape = self.model.get_parameter(name).shape
            return torch.ones(shape) if len(shape) == 1 else torch.randn(shape).mul_(0.02)

    config: Any = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=2048, **SIZES[size])  # pyright: ignore
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    layers = tuple(path for path, _ in decoder_layers(model))
    plan = make_plan(Roles(sites_of(model), layers, "model.embed_tokens", "lm_head", True), TernarySpec(placement="none"))
    apply_plan(model, plan)
    source, stem = Random(model, plan, AutoTokenizer.from_pretrained(MODEL)), PACKED_FILE.removesuffix(".safetensors")
    if form == "latent":
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        entries = [Entry(n, torch.float32, s, lambda n=n: source.kept(n)) for n, s in shapes.items()]
        extra: dict[str, Any] = {}
    else:
        contents = contents_of(source, form, "fp32" if form == "autobitlinear" else "bf16")
        entries, extra = contents.entries, {"dtype": contents.dtype, **contents.card}
        if contents.quantization is not None:
            extra["quantization_config"] = contents.quantization
    needed = sum(entry.bytes for entry in entries) + 2.5 * sum(parameter.numel() for parameter in model.parameters())
    if (free := shutil.disk_usage(run.parent).free) < needed:
        raise SystemExit(f"{run.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} are needed: give --out.")
    with atomic_directory(run / ("latent" if form == "latent" else "model")) as directory:
        stream_tensors(entries, directory, stem if form == "packed" else "model")
        write_companions(directory, model, plan, source.tokenizer, form, extra)
    write_json(run / "run.json", {"config": {"model": "random", "placement": "none"}, "result": {}})
    return max(entry.bytes for entry in entries)


def export(run: Path, to: str, out: Path) -> None:
    """In a process of its own: export without the check, and say what was in memory at most."""
    from trilobit.config.export import ExportConfig
    from trilobit.export import convert
    from trilobit.export.check import Check

    convert.verify = lambda *arguments: Check(why_not="bench/export.py measures the writing")
    result = convert.run(ExportConfig(model=str(run), out=str(out), to=to))  # pyright: ignore[reportArgumentType]
    print(json.dumps({"form": result.form, "bytes": result.bytes, "peak": peak_bytes()}))


def peak_bytes() -> int:
    """The most this process has had resident. Not getrusage's: that begins with what its parent had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def cpu_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--form", choices=("autobitlinear", "packed", "latent"), default="autobitlinear")
    parser.add_argument("--to", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--out", type=Path, help="where the temporary folder is made")
    parser.add_argument("--child", nargs=3, metavar=("RUN", "TO", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        export(Path(arguments.child[0]), arguments.child[1], Path(arguments.child[2]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.out) as name:
        folder = Path(name)
        largest = make(folder / "run", arguments.size, arguments.form)
        stored = sum(file.stat().st_size for file in (folder / "run").rglob("*.safetensors"))
        most = TIMES * largest + BEYOND
        print(f"{arguments.size}, stored as {arguments.form}, {stored / 1e9:.2f} GB; {os.cpu_count()} processors")
        print(f"limits: {MOST_SECONDS:.0f} s, {most / 1e6:,.0f} MB (largest tensor {largest / 1e6:,.0f} MB)")
        print(f"{'to':<8}{'seconds':>9}{'CPU':>8}{'peak MB':>10}{'file MB':>10}  form")
        for to in arguments.to:
            out = folder / "out"
            command = [sys.executable, str(Path(__file__)), "--child", str(folder / "run"), to, str(out)]
            start, worked = time.perf_counter(), cpu_seconds()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds, worked = time.perf_counter() - start, cpu_seconds() - worked
            if done.returncode:
                raise SystemExit(f"--to {to} failed:\n{done.stderr[-2000:]}")
            said = json.loads(done.stdout.splitlines()[-1])
            marks = "" if seconds <= MOST_SECONDS and said["peak"] <= most else "  BEYOND ITS LIMIT"
            megabytes = f"{said['peak'] / 1e6:>10,.0f}{said['bytes'] / 1e6:>10,.0f}"
            print(f"{to:<8}{seconds:>9.1f}{worked:>8.1f}{megabytes}  {said['form']}{marks}", flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
