"""How fast text becomes tokens: MB of UTF-8 text per second, the median of three runs, as train/data.py does it.

    python bench/tokenizing.py --tokenizer DIR --data PATH

Each run loads the tokenizer anew (no word is known), reads, tokenises and writes; the cache goes to a temporary folder.
(Not called tokenize.py: a script's folder comes first on sys.path, and that would hide the standard module.)
MB per CPU second is the steadier number where other work runs beside it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from trilobit.train.data import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--text-field", default="text")
    arguments = parser.parse_args()
    speeds, per_cpu = [], []
    for _ in range(3):
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = prepare(
                arguments.data, tokenizer, vocab_size=len(tokenizer), text_field=arguments.text_field,
                cache_dir=Path(folder),
            )  # fmt: skip
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size, count = tokens.train_bytes + tokens.heldout_bytes, len(tokens.train) + len(tokens.heldout)
        speeds.append(size / wall / 1e6)
        per_cpu.append(size / cpu / 1e6)
    print(
        f"{arguments.tokenizer}: {statistics.median(speeds):.2f} MB/s, {statistics.median(per_cpu):.2f} MB per CPU second "
        f"({size / 1e6:.1f} MB, {count:,} tokens, {size / count:.2f} bytes each)"
    )


if __name__ == "__main__":
    main()
