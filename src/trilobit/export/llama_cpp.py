"""What llama.cpp makes of a GGUF file, by the package xllamacpp (a prebuilt one), in a process of its own.

    python -m trilobit.export.llama_cpp FOLDER      FOLDER/request.json  ──▶  FOLDER/answer.safetensors, answer.json

For every position of some token windows: the `top` most likely next tokens and their log probabilities. Models are compared
on those, all other tokens taken as one: by the data processing inequality KL so computed is at most the whole one, and with a
thousand tokens hardly less.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trilobit.errors import VerificationError
from trilobit.export.verify import Agreement, agreement_of
from trilobit.storage import read_json
from trilobit.tensors import save_tensors

TOP = 1024
CONTINUED = 24  # tokens of the prompt's continuation
LONGEST = 1800.0  # seconds


@dataclass(frozen=True)
class Reading:
    """ids [P, top] and log probabilities [P, top] of the most likely next tokens at each position, the windows' positions one
    after another; the texts of the request as token ids; a greedy continuation of the prompt."""

    ids: Tensor
    logprobs: Tensor
    tokens: list[list[int]]
    continuation: str


def available() -> bool:
    return find_spec("xllamacpp") is not None


def read(file: Path, windows: Tensor, texts: list[str], prompt: str, *, top: int = TOP, threads: int = 0) -> Reading:
    """Run `file` on token windows [N, W + 1] (the last token is only a target). Raises VerificationError with what llama.cpp
    says if it refuses the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "file": str(file.absolute()), "windows": windows[:, :-1].tolist(), "texts": texts, "prompt": prompt, "top": top,
            "threads": threads or torch.get_num_threads(),
        }  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "trilobit.export.llama_cpp", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
        except subprocess.TimeoutExpired as error:
            raise VerificationError(
                f"llama.cpp has not read {windows.numel():,} tokens in {LONGEST:.0f} s. The file was not left behind; "
                "--type tq2_0 is faster there."
            ) from error
        if done.returncode != 0:
            raise VerificationError(f"llama.cpp cannot run what was written: {_complaint(done.stderr)} It was not left behind.")
        answer, rest = load_file(folder / "answer.safetensors"), read_json(folder / "answer.json")
    return Reading(answer["ids"].long(), answer["logprobs"], rest["tokens"], rest["continuation"])


def _complaint(log: str) -> str:
    """What of llama.cpp's log says why."""
    lines = [line for line in log.splitlines() if "error" in line.lower() or "Error" in line]
    return " ".join(" ".join(line.split()) for line in lines[:3]) or log[-300:] or "it said nothing."


@torch.no_grad()
def compare_reading(reference: torch.nn.Module, reading: Reading, windows: Tensor) -> Agreement:
    """How llama.cpp's next tokens agree with `reference`'s on the same windows [N, W + 1]."""
    return agreement_of(_pairs(reference, reading, windows))


def _pairs(reference: torch.nn.Module, reading: Reading, windows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each window log probabilities of both models over `top` tokens and the rest, and where the target is among these."""
    position = 0
    for window in windows:
        logits = reference(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        part = slice(position, position + len(logits))
        ids, theirs = reading.ids[part], reading.logprobs[part]
        ours = torch.log_softmax(logits, dim=-1).gather(1, ids)
        targets = window[1:, None]
        found = ids == targets
        where = torch.where(found.any(1), found.int().argmax(1), ids.shape[1])
        yield _with_rest(ours), _with_rest(theirs), where
        position += len(logits)


def _with_rest(logprobs: Tensor) -> Tensor:
    """[T, k] → [T, k + 1]: what is left of the probability as one more."""
    rest = (1 - logprobs.double().exp().sum(dim=1, keepdim=True)).clamp_min(1e-12)
    return torch.cat([logprobs.double(), rest.log()], dim=1)


# ── the other process ──


def main(folder: Path) -> None:
    xllamacpp: Any = import_module("xllamacpp")

    request = read_json(folder / "request.json")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["file"]
    parameters.n_ctx = max([256, *(len(window) + 8 for window in request["windows"])])
    parameters.n_parallel, parameters.n_gpu_layers, parameters.cache_ram_mib, parameters.warmup = 1, 0, 0, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    parameters.swa_full = True  # else a prompt that grows is not continued where it ended
    server = xllamacpp.Server(parameters)

    def complete(prompt: Any, count: int, **more: Any) -> Any:
        settings = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "cache_prompt": True, **more}
        answer = server.handle_completions(settings)
        return (json.loads(answer) if isinstance(answer, str | bytes) else answer)["choices"][0]

    # An answer without text (an end token, half a character) has no probabilities: a plain letter is what is answered, always.
    # What is ranked are the model's own logits.
    letter = _tokens(server.listening_address, "a")[-1]
    ranking = {"n_probs": request["top"], "logit_bias": [[letter, 1e6]]}
    ids, logprobs = [], []
    for window in request["windows"]:
        for end in range(1, len(window) + 1):
            ranked = complete(window[:end], 1, **ranking)["logprobs"]["content"][0]["top_logprobs"]
            ids.append([entry["id"] for entry in ranked])
            logprobs.append([entry["logprob"] for entry in ranked])
    save_tensors({"ids": torch.tensor(ids), "logprobs": torch.tensor(logprobs)}, folder / "answer.safetensors")
    tokens = [_tokens(server.listening_address, text) for text in request["texts"]]
    continuation = complete(request["prompt"], CONTINUED)["text"] if request["prompt"] else ""
    (folder / "answer.json").write_text(json.dumps({"tokens": tokens, "continuation": continuation}))


def _tokens(address: str, text: str) -> list[int]:
    """A text as llama.cpp tokenises it, asked for over the loopback address its server listens on."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["tokens"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
