"""The native engine against llama.cpp in one run: decoding, prompts, sequences together; tokens/s, and against the roofs.

    python bench/engine.py [--peer PYTHON --models DIR] [--shapes bitnet-2b smollm2-135m] [--rounds 5] [--json FILE]
    python bench/engine.py --ready

Models of the named shapes with random ternary weights (speed does not depend on them). The peer is llama-cpp-python in an
environment of its own, PYTHON, on the files that bench/llama_cpp.py writes to DIR as SHAPE-TYPE.gguf; without one, roofs
only. Everything is measured once in every round, one after another, and reported as the median; each side at its better
number of threads. Fractions are of the roof of the same round: bytes of weights a token (all matrices and the head, not the
table of embeddings) over what memory gives to reads, and integer operations over a loop of vpdpbusd on registers.

Each side's weights lie as it puts them: ours on huge pages where the system grants them, llama.cpp's in the mapped file.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from native import helper, processor

from trilobit.infer import native_file
from trilobit.infer.graph import DTYPES, Graph, Header, expected_tensors
from trilobit.kernels import native
from trilobit.kernels.engine import Session
from trilobit.kernels.native import Format

HEAD_GROUP = 32
CONTEXT, DECODED, PROMPT, SEQUENCES = 32, 32, 512, 16
ROOF_BYTES = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "bitnet-2b": {"width": 2560, "hidden": 6912, "heads": 20, "kv_heads": 5, "head_size": 128, "vocabulary": 32_000},
    "smollm2-135m": {"width": 576, "hidden": 1536, "heads": 9, "kv_heads": 3, "head_size": 64, "vocabulary": 49_152},
}
PEERS = {"bitnet-2b": ("tq2_0", "tq1_0", "q4_0"), "smollm2-135m": ("q4_0", "q8_0", "q2_0")}


def random_model(shape: str, layout: Format, layers: int = 30) -> Graph:
    """A graph with every tensor it must have, and random codes, on huge pages."""
    header = Header(
        **SHAPES[shape], layers=layers, positions=4096, eps=1e-5, attention_scale=SHAPES[shape]["head_size"] ** -0.5,
        rotary_scale=1.0, gate="silu", windows=[0] * layers, rotary=[True] * layers, layout=layout, group=0,
        activations="token", norm_eps=1e-6, ternary_head=False, head_group=HEAD_GROUP, ternary_embedding=False,
    )  # fmt: skip
    expected = {name: e for name, e in expected_tensors(header).items() if not e.optional}
    sizes = {name: e.shapes[0][0] for name, e in expected.items() if e.dtype == "U8"}
    memory, at = native.huge_pages(sum(sizes.values())), 0
    tensors: dict[str, torch.Tensor] = {}
    for name, e in expected.items():
        if e.dtype == "U8":
            tensors[name] = memory[at : at + sizes[name]]
            at += sizes[name]
            if name.startswith("head"):
                tensors[name].random_(0, 256)
            elif layout == "base-3":
                tensors[name].random_(0, 243)
            else:
                codes = torch.randint(0, 3, (4, sizes[name]), dtype=torch.uint8)
                torch.sum(
                    codes << torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8), 0, out=tensors[name], dtype=torch.uint8
                )
        else:
            tensors[name] = torch.full(e.shapes[0], 0.02 if name.endswith("scales") else 1.0, dtype=DTYPES[e.dtype])
    tensors["rope.frequencies"] = 10_000 ** -(torch.arange(header.head_size // 2) * 2 / header.head_size)
    return Graph(header, tensors)


def weight_bytes(model: Graph) -> int:
    """Bytes read for every token."""
    return sum(tensor.nbytes for name, tensor in model.tensors.items() if name != "embedding")


def operations(model: Graph) -> int:
    """Integer operations of a token's projections (without the head, which a prompt needs once)."""
    return 2 * model.header.layers * sum(rows * columns for rows, columns in model.header.matrices().values())


class Ours:
    """The engine on one model and number of threads; methods return seconds."""

    def __init__(self, model: Graph, threads: int):
        self.session = Session(model.decoder(), slots=SEQUENCES, capacity=1024, most_tokens=PROMPT, threads=threads)
        self.out = torch.empty(SEQUENCES, model.header.vocabulary)

    def _run(self, slots: list[int], positions: list[int], rows: list[int]) -> None:
        ids = torch.full((len(slots),), 7, dtype=torch.int32)
        tensors = [torch.tensor(values, dtype=torch.int32) for values in (slots, positions, rows)]
        self.session.run(ids, *tensors, out=self.out[: len(rows)])

    def prompt(self) -> float:
        start = time.perf_counter()
        self._run([0] * PROMPT, list(range(PROMPT)), [PROMPT - 1])
        return time.perf_counter() - start

    def decode(self) -> float:
        self._run([0] * CONTEXT, list(range(CONTEXT)), [CONTEXT - 1])
        start = time.perf_counter()
        for position in range(CONTEXT, CONTEXT + DECODED):
            self._run([0], [position], [0])
        return time.perf_counter() - start

    def together(self) -> float:
        every = list(range(SEQUENCES))
        start = time.perf_counter()
        for position in range(DECODED // 2):
            self._run(every, [position] * SEQUENCES, every)
        return time.perf_counter() - start


class Peer:
    """bench/llama_cpp.py serving one file; methods return seconds."""

    def __init__(self, python: Path, model: Path):
        script = Path(__file__).with_name("llama_cpp.py")
        command = [str(python), str(script), "serve", str(model), "--threads", "1"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer stopped"
        return json.loads(line)

    def ask(self, command: str, threads: int) -> float:
        assert self.process.stdin is not None
        for said in (f"threads {threads}", command):
            self.process.stdin.write(said + "\n")
            self.process.stdin.flush()
            answer = self._answer()
            assert "error" not in answer, answer
        return answer["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Row:
    """One side, one way of running, one number of threads: tokens of a measurement, and its rounds."""

    shape: str
    way: str
    who: str
    threads: int
    tokens: int
    run: Callable[[], float]
    work: float = 0.0  # bytes or operations a token
    ours: bool = False
    rates: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def rows_of(shape: str, arguments: argparse.Namespace, close: list[Peer]) -> list[Row]:
    """Everything that is measured on a shape."""
    rows: list[Row] = []
    best: Format = "base-3" if "avx512vbmi" in native.instruction_sets() else "two-bit"
    for layout in dict.fromkeys(["two-bit", best]):
        model = random_model(shape, layout)
        for threads in arguments.threads:
            ours = Ours(model, threads)
            size, work = weight_bytes(model), operations(model)
            rows.append(Row(shape, "decode", layout, threads, DECODED, ours.decode, size, True))
            if layout == best:
                rows.append(Row(shape, f"prompt of {PROMPT}", layout, threads, PROMPT, ours.prompt, work, True))
                count = SEQUENCES * (DECODED // 2)
                rows.append(Row(shape, f"{SEQUENCES} sequences", layout, threads, count, ours.together, 0, True))
    if arguments.peer:
        for kind in PEERS[shape]:
            path = arguments.models / f"{shape}-{kind}.gguf"
            if not path.exists():
                continue
            peer = Peer(arguments.peer, path)
            close.append(peer)
            for threads in arguments.threads:

                def ask(command: str, peer: Peer = peer, threads: int = threads) -> Callable[[], float]:
                    return lambda: peer.ask(command, threads)

                size = peer.about["bytes_per_token"]
                rows.append(Row(shape, "decode", kind, threads, DECODED, ask(f"decode {DECODED} {CONTEXT}"), size))
                if kind not in ("q2_0", "tq1_0"):  # scalar code: minutes; slower than tq2_0
                    rows.append(Row(shape, f"prompt of {PROMPT}", kind, threads, PROMPT, ask(f"prefill {PROMPT}")))
    return rows


READY = """
import resource, sys, time, torch
from pathlib import Path
from trilobit.infer import native_file
from trilobit.kernels.engine import Session
resident = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
before = resident()
start = time.perf_counter()
graph = native_file.read(Path(sys.argv[1]), sys.argv[2])
session = Session(graph.decoder(), capacity=1024)
ready = time.perf_counter() - start
token = torch.zeros(1, dtype=torch.int32)
session.run(token, token, token)
first = time.perf_counter() - start
print(ready, first, resident() - before - Path(sys.argv[1]).stat().st_size, session.bytes)
"""


def print_ready(shape: str) -> None:
    """How long a native file takes from being opened to being ready, and to its first token; and memory beyond the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native.safetensors"
        native_file.write(random_model(shape, "base-3"), path)
        for memory in ("mapped", "copied"):
            command = [sys.executable, "-c", READY, str(path), memory]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            ready, first, beyond, session = map(float, done.stdout.split())
            size = path.stat().st_size / 1e6
            print(
                f"{shape}, {size:.0f} MB, {memory}: ready in {ready:.2f} s, first token after {first:.2f} s; memory beyond "
                f"the file {beyond / 1e6:.0f} MB (session {session / 1e6:.0f} MB)", flush=True
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="python with llama-cpp-python")
    parser.add_argument("--models", type=Path, help="folder of SHAPE-TYPE.gguf")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ready", action="store_true", help="only say how fast a file of the first shape is ready")
    arguments = parser.parse_args()
    if arguments.ready:
        return print_ready(arguments.shapes[0])
    assert "avx512" in native.instruction_sets(), "the roof of the products needs AVX-512"
    library, area = helper(), native.huge_pages(ROOF_BYTES).fill_(1)

    def roof() -> float:
        def rate(threads: int) -> float:
            start = time.perf_counter()
            native.read(area, threads=threads)
            return ROOF_BYTES / (time.perf_counter() - start)

        return max(rate(threads) for threads in arguments.threads for _ in range(3))

    library.peak_operations.restype = ctypes.c_double
    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}", flush=True)
    results: list[Row] = []
    for shape in arguments.shapes:
        close: list[Peer] = []
        rows = rows_of(shape, arguments, close)
        for row in rows:
            row.run()  # warm
        roofs: list[float] = []
        for _ in range(arguments.rounds):
            for row in rows:
                limit = library.peak_operations(5) * row.threads if row.way.startswith("prompt") else roof()
                seconds = row.run()
                row.rates.append(row.tokens / seconds)
                row.fractions.append(row.tokens * row.work / seconds / limit)
                if not row.way.startswith("prompt"):
                    roofs.append(limit)
        for peer in close:
            peer.close()
        results += rows
        print(f"\n{shape}: read roof {statistics.median(roofs) / 1e9:.1f} GB/s\n")
        print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([summary(row, results) for row in results], indent=1) + "\n")


def best_peer(row: Row, rows: list[Row]) -> float | None:
    """The best of llama.cpp's rates at the same thing."""
    rates = [r.rate for r in rows if not r.ours and (r.shape, r.way) == (row.shape, row.way)]
    return max(rates, default=None)


def summary(row: Row, rows: list[Row]) -> dict[str, Any]:
    """A row as JSON."""
    peer = best_peer(row, rows) if row.ours else None
    share = statistics.median(row.fractions) if row.work else None
    prompt = row.way.startswith("prompt")
    return {
        "shape": row.shape, "what": row.way, "engine": "trilobit" if row.ours else "llama.cpp", "layout": row.who,
        "threads": row.threads, "tokens_per_second": row.rate, "bandwidth_fraction": None if prompt else share,
        "compute_fraction": share if prompt else None, "ratio_to_llama_cpp": row.rate / peer if peer else None,
    }  # fmt: skip


def print_table(rows: list[Row]) -> None:
    """For each way of running, every side and number of threads."""
    print("| | layout | threads | tokens/s | of the roof | × llama.cpp's best |\n|---|---|---|---|---|---|")
    for way in dict.fromkeys(row.way for row in rows):
        for row in (r for r in rows if r.way == way):
            peer = best_peer(row, rows)
            share = statistics.median(row.fractions)
            cells = [way, f"{'trilobit' if row.ours else 'llama.cpp'} {row.who}", str(row.threads), f"{row.rate:,.1f}"]
            cells += [f"{share:.2f}" if row.work else "", f"{row.rate / peer:.2f}" if row.ours and peer else ""]
            print(f"| {' | '.join(cells)} |", flush=True)
    together = max((r.rate for r in rows if r.way.endswith("sequences")), default=0.0)
    alone = max((r.rate for r in rows if r.ours and r.way == "decode"), default=0.0)
    if together and alone:
        print(f"\n{SEQUENCES} sequences together: {together / alone:.2f} × the tokens/s of one")


if __name__ == "__main__":
    main()
