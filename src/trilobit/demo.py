"""`trilobit demo`: the main job on a model small enough to watch. Everything is in the package; nothing is fetched.

The embedded checkpoint (assets/model) is a Llama of 3.5 M parameters (untied) that was pre-trained outlier-safe on Python's
standard library by experiments/embedded_pair.sh. The demo makes it ternary on the same text and shows both on the part
neither has seen.
It learns from the original's logits: the text alone would teach it what the original was stopped before it overfitted to.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from trilobit.config.demo import DemoConfig
from trilobit.config.tune import TuneConfig
from trilobit.errors import OutputError, TrilobitError
from trilobit.infer.hf import continue_tokens
from trilobit.infer.load import load
from trilobit.listener import SILENT, Listener
from trilobit.storage import read_json
from trilobit.train import tune

MODEL = Path(__file__).parent / "assets" / "model"
PROMPT = '    def close(self):\n        """Close'
PENALTY = 1.2  # of repetition: so small a model goes in circles without


@dataclass(frozen=True)
class DemoResult:
    """Sizes in bytes (the original as the bf16 it ships in), held-out perplexities, and what each continues PROMPT with."""

    out: str
    seconds: float
    tokens: int
    original_bytes: int
    ternary_bytes: int
    ternary_parameters: int
    original_perplexity: float
    ternary_perplexity: float
    nats_above_original: float
    form: str
    prompt: str
    original_sample: str
    ternary_sample: str

    def summary(self) -> str:
        inside = self.ternary_parameters
        rows = [
            ("", "original", "ternary"),
            ("size", f"{self.original_bytes / 1e6:.2f} MB", f"{self.ternary_bytes / 1e6:.2f} MB"),
            ("  layers' matrices", f"{inside * 2 / 1e6:.2f} MB", f"{inside / 4 / 1e6:.2f} MB"),
            ("perplexity, held out", f"{self.original_perplexity:.2f}", f"{self.ternary_perplexity:.2f}"),
        ]
        table = "\n".join(f"{a:<22}{b:>12}{c:>12}" for a, b, c in rows)
        samples = "\n\n".join(
            f"── {name} continues ──\n{self.prompt}{sample}"
            for name, sample in (("the original", self.original_sample), ("the ternary model", self.ternary_sample))
        )
        return (
            f"\n{table}\n\n{self.nats_above_original:.3f} nats per token above the original after {self.tokens:,} tokens "
            f"in {self.seconds:.0f} s.\nThe {inside / 1e6:.1f} M weights of the layers' matrices take 2 bits each instead of "
            "16. Embedding and head are kept in full\n(fp32 in this form): most of so small a model, little of a large one.\n\n"
            f"{samples}\n\n{self._made()}\n\n{self._next()}"
        )

    def _made(self) -> str:
        return (
            f"made  {self.out}/model      the ternary model; stock transformers loads it ({self.form})\n"
            f"      {self.out}/loss.png   and lambda.png, flips.png: how it went; run.json, log.jsonl: every number of it"
        )

    def _next(self) -> str:
        out, prompt = self.out, self.prompt.replace("\n", "\\n")
        commands = {
            f"trilobit generate {out} $'{prompt}' --repetition-penalty {PENALTY}": "this, on the engine",
            f"trilobit eval {out} --data stdlib": "the perplexity again",
            f"trilobit export {out} --to native --out {out}-native": "one file that the engine maps",
            f"trilobit bench {out}-native": "how fast that runs, against what memory allows",
            "trilobit tune MODEL --data TEXT --out out/mine": "the same for a model of yours: a hub id or a directory",
            "trilobit export out/mine --to gguf --out out/mine-gguf": "for llama.cpp, of a run with --placement output or none",
        }
        return "\n".join(["next", *(f"  {command}\n      {what}" for command, what in commands.items())])


def run(config: DemoConfig, listener: Listener = SILENT) -> DemoResult:
    """Tune the embedded model as configured."""
    out = Path(config.out)
    _clear_earlier_demo(out)
    settings = TuneConfig(
        model=str(MODEL), data="stdlib", out=str(out), max_tokens=config.max_tokens, batch_tokens=1024,
        sequence_length=256, sequences=4, lr=2e-3, schedule="global", distill="logits", eval_tokens=65_536,
        eval_every=max(config.max_tokens // 5, 1), device=config.device, seed=config.seed,
    )  # fmt: skip
    result = tune.run(settings, listener)
    return DemoResult(
        out=str(out), seconds=result.seconds, tokens=result.tokens, original_bytes=result.base_bytes,
        ternary_bytes=result.model_bytes, ternary_parameters=result.ternary_parameters,
        original_perplexity=result.base_perplexity, ternary_perplexity=result.perplexity,
        nats_above_original=result.nats_per_token - result.base_nats_per_token,
        form=result.form, prompt=PROMPT, original_sample=_sample(MODEL), ternary_sample=_sample(out),
    )  # fmt: skip


def _clear_earlier_demo(out: Path) -> None:
    """Remove `out` if it is the run directory of an earlier demo; anything else there is the user's and stays."""
    if not out.exists():
        return
    try:
        earlier = read_json(out / "run.json")["config"]["model"] == str(MODEL)
    except (TrilobitError, KeyError, TypeError):
        earlier = False
    if not earlier:
        raise OutputError(f"{out} exists and is not an earlier demo: choose another name with --out.")
    shutil.rmtree(out)


def _sample(source: Path) -> str:
    loaded = load(source)
    inputs = torch.tensor([loaded.tokenizer(PROMPT)["input_ids"]])
    output = continue_tokens(loaded.model, inputs, 48, repetition_penalty=PENALTY)
    return str(loaded.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))
