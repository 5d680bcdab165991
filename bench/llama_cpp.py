"""llama.cpp's side of the speed tables: random model files of known shapes, and a process that measures them on demand.

It runs in an environment of its own, without torch and trilobit. One that makes the most of a machine (some ten minutes,
needs a C++ compiler; llama.cpp is compiled for the processor it is built on):

    python -m venv peers && peers/bin/pip install numpy gguf
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF" peers/bin/pip install llama-cpp-python==0.3.36 \
        --no-binary llama-cpp-python -C cmake.build-type=Release

    peers/bin/python bench/llama_cpp.py write bitnet-2b tq2_0 2b.gguf
    peers/bin/python bench/llama_cpp.py serve 2b.gguf --threads 1

`write`: the plain `llama` graph with ternary weights of one type, drawn at random; embedding and head are Q8_0 and not
tied. Speed does not depend on the values; scales keep every activation near one. TQ types need widths that 256 divides.

`serve`: one line of JSON when the model is loaded, then one per line read, so that a script in another environment can
let its own measurements and these take turns. Nothing is repeated or averaged here, and the first answer of a kind also
pays for cold memory: drop it. What comes before the measured calls (opening a cache, filling it) is not in `seconds`.

    decode N CONTEXT        N tokens, one at a time, after CONTEXT others
    batch S N [CONTEXT]     S sequences at once, N tokens each, one at a time
    prefill N               N tokens in one call into an empty cache; logits of the last
    threads N               from here on

OMP_WAIT_POLICY=PASSIVE keeps its idle threads off the processors while others measure.
"""

import argparse
import ctypes
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Shape(NamedTuple):
    width: int
    layers: int
    inner: int
    heads: int
    cache_heads: int
    vocabulary: int


SHAPES = {
    "bitnet-2b": Shape(2560, 30, 6912, 20, 5, 32_000),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 49_152),
}


class Form(NamedTuple):
    """A block of a GGUF type: one fp16 scale, before or after runs of bytes, each run with the values it may take."""

    type_id: int
    weights: int
    scale_first: bool
    runs: tuple[tuple[int, Bytes], ...]

    def size(self, rows: int, width: int) -> int:
        """Bytes of a matrix."""
        return rows * width // self.weights * (2 + sum(count for count, _ in self.runs))


def fields(bits: int, smallest: int) -> Bytes:
    """All bytes whose fields of `bits` bits hold a ternary symbol: smallest, smallest + 1 or smallest + 2."""
    symbols = itertools.product(range(smallest, smallest + 3), repeat=8 // bits)
    return np.array([sum(s << (bits * i) for i, s in enumerate(byte)) for byte in symbols], np.uint8)


def base3(trits: int) -> Bytes:
    """All bytes that hold so many trits, the most significant first, as a fraction of 256, rounded up."""
    return np.array([-(-number * 3 ** (5 - trits) * 256 // 243) for number in range(3**trits)], np.uint8)


FORMS = {
    "tq1_0": Form(34, 256, False, ((48, base3(5)), (4, base3(4)))),
    "tq2_0": Form(35, 256, False, ((64, fields(2, 0)),)),
    "q2_0": Form(42, 64, True, ((16, fields(2, 0)),)),
    "q4_0": Form(2, 32, True, ((16, fields(4, 7)),)),
    "q8_0": Form(8, 32, True, ((32, np.array([-1, 0, 1], np.int8).view(np.uint8)),)),
}


def packed(form: Form, rows: int, width: int, scale: float, random: np.random.Generator) -> Bytes:
    """A random ternary matrix in the type's bytes, [blocks, bytes of a block]."""
    blocks = rows * width // form.weights
    parts = [values[random.integers(len(values), size=(blocks, count), dtype=np.uint8)] for count, values in form.runs]
    scales = np.full((blocks, 1), scale, np.float16).view(np.uint8)
    return np.concatenate([scales, *parts] if form.scale_first else [*parts, scales], axis=1)


def matrices(shape: Shape, form: Form) -> Iterator[tuple[str, Form, int, int]]:
    """Name, type, rows and width of each."""
    width, cached = shape.width, shape.width // shape.heads * shape.cache_heads
    yield "token_embd", FORMS["q8_0"], shape.vocabulary, width
    yield "output", FORMS["q8_0"], shape.vocabulary, width
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", cached, width),
            ("attn_v", cached, width),
            ("attn_output", width, width),
            ("ffn_gate", shape.inner, width),
            ("ffn_up", shape.inner, width),
            ("ffn_down", width, shape.inner),
        ):
            yield f"blk.{layer}.{name}", form, rows, columns


def write(shape: Shape, form: Form, path: Path) -> dict[str, Any]:
    """A model file, one tensor in memory at a time.

    Its metadata hold `trilobit.bytes_per_token`: everything but the embedding, of which a token reads one row.
    """
    wrong = sorted({width for _, f, _, width in matrices(shape, form) if width % f.weights})
    if wrong:
        raise SystemExit(f"skipped: blocks hold {form.weights} weights, which does not divide a width of {wrong[0]}")
    gguf = import_module("gguf")
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.cache_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    norms = ["output_norm"] + [f"blk.{i}.{name}_norm" for i in range(shape.layers) for name in ("attn", "ffn")]
    ones = np.ones(shape.width, np.float32)
    read = ones.nbytes * len(norms)
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", ones.shape, ones.dtype, ones.nbytes)
    for name, f, rows, width in matrices(shape, form):
        size = f.size(rows, width)
        read += size if name != "token_embd" else 0
        writer.add_tensor_info(f"{name}.weight", (rows, width), np.dtype(np.int8), size, raw_dtype=f.type_id)
    writer.add_uint64("trilobit.bytes_per_token", read)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in norms:
        writer.write_tensor_data(ones)
    random = np.random.default_rng(0)
    for name, f, rows, width in matrices(shape, form):
        scale = 1.0 if name == "token_embd" else math.sqrt(1.5 / width)
        writer.write_tensor_data(packed(f, rows, width, scale, random))
    writer.close()
    part.replace(path)
    return {"path": str(path), "bytes": path.stat().st_size, "bytes_per_token": read}


def library() -> Any:
    """llama-cpp-python, past this file, which has its name and lies in the folder Python looks into first."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return import_module("llama_cpp")


@dataclass
class Session:
    """A context of llama.cpp: room for `steps` tokens after `context` others, of each sequence."""

    handle: Any
    memory: Any
    batch: Any
    filled: bool = False


class Peer:
    """One loaded model, and its sessions, each opened when first asked for."""

    def __init__(self, path: str, threads: int) -> None:
        self.library = library()
        self.threads = threads
        self.sessions: dict[tuple[int, int, int], Session] = {}
        self.library.llama_backend_init()
        self.model = self.library.llama_model_load_from_file(path.encode(), self.library.llama_model_default_params())
        if self.model is None:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocabulary: int = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))

    def about(self) -> dict[str, Any]:
        text = ctypes.create_string_buffer(256)
        found = self.library.llama_model_meta_val_str(self.model, b"trilobit.bytes_per_token", text, len(text))
        read = int(text.value) if found > 0 else None
        self.library.llama_model_desc(self.model, text, len(text))
        return {
            "model": text.value.decode(),
            "parameters": self.library.llama_model_n_params(self.model),
            "bytes_per_token": read,
            "threads": self.threads,
            "llama_cpp_python": self.library.__version__,
            "llama_cpp": self.library.llama_version().decode(),
            "system": self.library.llama_print_system_info().decode().strip(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        }

    def session(self, sequences: int, context: int, steps: int) -> Session:
        key = sequences, context, steps
        if key not in self.sessions:
            most = max(context, steps, sequences)
            room = -(-(context + steps) // 256) * 256
            settings = self.library.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = sequences * room, sequences
            settings.n_batch = settings.n_ubatch = most
            settings.n_threads = settings.n_threads_batch = self.threads
            handle = self.library.llama_init_from_model(self.model, settings)
            assert handle is not None, f"no context for {sequences} × {room} tokens"
            batch = self.library.llama_batch_init(most, 0, 1)
            self.sessions[key] = Session(handle, self.library.llama_get_memory(handle), batch)
        return self.sessions[key]

    def submit(self, session: Session, positions: range, sequences: range) -> None:
        """One call of llama_decode: these positions of these sequences; logits of each one's last."""
        batch = session.batch
        batch.n_tokens = len(positions) * len(sequences)
        for i, (sequence, position) in enumerate(itertools.product(sequences, positions)):
            batch.token[i] = (7919 * position + 31 * sequence) % self.vocabulary
            batch.pos[i] = position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = position == positions[-1]
        result = self.library.llama_decode(session.handle, batch)
        assert result == 0, f"llama_decode returned {result}"

    def seconds(self, sequences: int, context: int, steps: int, at_once: int = 1) -> float:
        """Of `steps` tokens for each sequence after `context` others, `at_once` of them in a call."""
        session = self.session(sequences, context, steps)
        self.library.llama_set_n_threads(session.handle, self.threads, self.threads)
        for sequence in range(sequences):
            self.library.llama_memory_seq_rm(session.memory, sequence, context, -1)
            if context and not session.filled:
                self.submit(session, range(context), range(sequence, sequence + 1))
        session.filled = True
        self.library.llama_synchronize(session.handle)
        start = time.perf_counter()
        for position in range(context, context + steps, at_once):
            self.submit(session, range(position, position + at_once), range(sequences))
        self.library.llama_synchronize(session.handle)
        elapsed = time.perf_counter() - start
        logits = np.ctypeslib.as_array(self.library.llama_get_logits_ith(session.handle, -1), (self.vocabulary,))
        assert np.isfinite(logits).all() and logits.std() > 0, "logits are constant or not finite"
        return elapsed

    def answer(self, line: str) -> dict[str, Any]:
        """Of one command."""
        name, *words = line.split()
        numbers = map(int, words) if all(map(str.isdecimal, words)) else ()
        match name, *numbers:
            case "threads", threads if threads > 0:
                self.threads = threads
                return {"command": line.strip(), "threads": threads}
            case "decode", steps, context if steps > 0:
                tokens, seconds = steps, self.seconds(1, context, steps)
            case "prefill", tokens if tokens > 0:
                seconds = self.seconds(1, 0, tokens, at_once=tokens)
            case ("batch", sequences, steps, *rest) if sequences > 0 and steps > 0 and len(rest) < 2:
                tokens, seconds = sequences * steps, self.seconds(sequences, sum(rest), steps)
            case _:
                return {"command": line.strip(), "error": "want: decode N CONTEXT, batch S N [CONTEXT], prefill N, threads N"}
        rate = tokens / seconds
        return {"command": line.strip(), "threads": self.threads, "seconds": seconds, "tokens_per_second": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="a random model file")
    writing.add_argument("shape", choices=SHAPES)
    writing.add_argument("type", choices=FORMS)
    writing.add_argument("path", type=Path)
    serving = commands.add_parser("serve", help="measure what standard input asks for")
    serving.add_argument("path")
    serving.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "write":
        print(json.dumps(write(SHAPES[arguments.shape], FORMS[arguments.type], arguments.path)))
        return
    peer = Peer(arguments.path, arguments.threads)
    print(json.dumps(peer.about()), flush=True)
    for line in filter(str.strip, sys.stdin):
        print(json.dumps(peer.answer(line)), flush=True)


if __name__ == "__main__":
    main()
