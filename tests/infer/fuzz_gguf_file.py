"""Damaged GGUF files, at random, for as long as asked: `python tests/infer/fuzz_gguf_file.py SECONDS [SEED]`.

Each of the architectures that are read, with flipped bits, other numbers, cuts and repeats, most of them in the header. A file
that is neither loaded nor refused with a ModelError within seconds is kept, and said.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from infer.ggufs import write_gguf
from infer.test_gguf_file import SECONDS, damaged
from trilobit.errors import ModelError
from trilobit.infer.gguf_file import open_gguf
from trilobit.infer.load import load

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
KINDS = {"llama": {}, "qwen2": {"ends": "q8_0"}, "qwen3": {"ends": "q2_0", "head_dim": 16}, "bitnet": {"granule": 0}}


def main(seconds: float, seed: int) -> int:
    torch.set_num_threads(1)
    folder, bad = Path(tempfile.mkdtemp()), 0
    for name, settings in KINDS.items():
        chosen, end, tried, loads, slowest = random.Random(seed), time.monotonic() + seconds / len(KINDS), 0, 0, 0.0
        whole = write_gguf(folder / f"{name}.gguf", name, "q2_0", **SMALL, **settings).path  # pyright: ignore
        content = whole.read_bytes()
        header = len(content) - sum(place.size for place in open_gguf(whole).tensors.values())
        path = folder / "damaged.gguf"
        while time.monotonic() < end:
            path.write_bytes(damaged(content, header, chosen))
            started, tried = time.perf_counter(), tried + 1
            try:
                load(path)
                loads += 1
            except ModelError:
                pass
            except Exception as error:
                bad += 1
                kept = path.rename(folder / f"{name}-{tried}.gguf")
                print(f"{kept}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.perf_counter() - started)
        bad += slowest > SECONDS
        print(f"{name}: {tried} damaged files, {loads} load, the slowest took {slowest:.2f} s")
    return bad


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
