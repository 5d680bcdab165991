"""`trilobit pretrain`: an architecture and text in, a model without activation outliers out (arXiv 2506.19697).

out/run.json         configuration, versions, seed, results
out/log.jsonl        one row a step; kurtosis by layer at each evaluation
out/tokenizer/       the tokenizer, if it was made of the text
out/checkpoints/     step-N: what --resume continues from, bit for bit
out/model/           a stock model: projections and scales folded in, read back by transformers and compared
out/loss.png, out/kurtosis.png
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trilobit.config.pretrain import PretrainConfig
from trilobit.corpus import documents
from trilobit.errors import ModelError, NonFiniteError, TrilobitError
from trilobit.export.hf import Written, write_full_precision
from trilobit.export.verify import in_words, record
from trilobit.infer.loaded import load_tokenizer
from trilobit.infer.quiet import quiet_transformers
from trilobit.listener import SILENT, Listener
from trilobit.measure.perplexity import nats, perplexity
from trilobit.storage import atomic_directory, is_whole
from trilobit.surgery.fold import fold, plain_parameters, require_same_names, stock_structure
from trilobit.surgery.outlier_safe import OutlierSafeSurgery, outlier_safe, require_causal
from trilobit.surgery.roles import vocabulary_size
from trilobit.tensors import weights_fingerprint
from trilobit.train.architecture import LLAMAS, fit_vocabulary, read_architecture, unused_rows
from trilobit.train.data import Tokens
from trilobit.train.drawn import NotDrawn, draw
from trilobit.train.evaluate import shared_nats
from trilobit.train.head_loss import LateHead
from trilobit.train.kurtosis import outlier_probes, site_kurtosis
from trilobit.train.layers import decide_compile, prepare_layers, set_attention
from trilobit.train.loop import Hooks, fit
from trilobit.train.mesh import make_mesh
from trilobit.train.objective import NextToken
from trilobit.train.parts import cut_whole, reshard, without_memory
from trilobit.train.plots import plot_kurtosis, plot_loss
from trilobit.train.record import new_record
from trilobit.train.run import Run, start
from trilobit.train.text import read_corpus
from trilobit.train.tokenizer import train_tokenizer, wrap_tokenizer

LR_TIMES_WIDTH, HIGHEST_LR = 0.4, 3e-3


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave. Nats are per token on the held-out windows; excess_kurtosis is the mean over layers of the residual
    stream, after the first position (`trilobit outliers` has the rest), None if the model could not be watched."""

    out: str
    model: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    heldout_tokens: int
    excess_kurtosis: float | None
    parameters: int
    model_bytes: int
    agreement: dict[str, float]

    def words(self) -> dict[str, str]:
        """What people are told instead of numbers."""
        return {"agreement": in_words(self.agreement)}


def run(config: PretrainConfig, listener: Listener = SILENT) -> PretrainResult:
    """Train a model as configured. Raises a TrilobitError that says what to do, and leaves nothing half-written."""
    return start(_Pretrain, config, f"{Path(config.architecture).absolute().name}-pretrained", listener, frozenset())


class _Pretrain(Run[PretrainConfig, PretrainResult]):
    """A model's way from random weights to a stock checkpoint."""

    result_type = PretrainResult
    written: Written | None = None

    def load(self, record: dict[str, Any] | None) -> None:
        """The tokenizer, and a model of random weights that depend on the seed alone, with its outlier-safe parts."""
        config = self.config
        architecture = read_architecture(config.architecture, config.sequence_length)
        self.tokenizer = self.read_tokenizer()
        fit_vocabulary(architecture, self.tokenizer, config.architecture in LLAMAS or config.train_tokenizer is not None)
        if unused := unused_rows(architecture, self.tokenizer):
            self.listener.note(f"{unused} (--train-tokenizer makes one that fits)")
        if config.embproj and architecture.tie_word_embeddings:
            self.listener.note("the architecture ties its head to the embedding; embedding projections untie them")
        if config.embproj or config.tie != "auto":
            architecture.tie_word_embeddings = config.tie == "yes"
        self.arrange(self.count(architecture))

        def build() -> PreTrainedModel:
            torch.manual_seed(config.seed)
            return self.from_config(architecture)

        if not (self.in_parts and self.build_in_parts(build)):
            self.model = build()
            self.listener.note(str(self.make_outlier_safe()))
            self.model.to(self.device)  # pyright: ignore[reportArgumentType]
        if config.attention is not None:
            set_attention(self.model, config.attention)
        self.fingerprint = weights_fingerprint(self.model)
        if record is not None and record["base"] != self.fingerprint:
            raise ModelError(f"{self.out} began from other random weights: continue it with the versions that run.json names.")

    def from_config(self, architecture: PretrainedConfig) -> PreTrainedModel:
        with quiet_transformers():
            try:
                return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
            except TrilobitError:  # of draw's own
                raise
            except Exception as error:  # whatever a config can do to a constructor
                what = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else str(error)
                raise ModelError(f"no language model can be made of {self.config.architecture}: {what}") from error

    def count(self, architecture: PretrainedConfig) -> int:
        """Parameters of the model that is trained, but for the norms."""
        if self.team.size == 1:
            return 0
        with torch.device("meta"):
            model = self.from_config(architecture)
        width = architecture.get_text_config().hidden_size
        return sum(p.numel() for p in model.parameters()) + 2 * self.config.embproj * width**2

    def make_outlier_safe(self, runs: bool = True) -> OutlierSafeSurgery:
        config = self.config
        return outlier_safe(self.model, ssnorm=config.ssnorm, embproj=config.embproj, seed=config.seed, runs=runs)

    def build_in_parts(self, build: Callable[[], PreTrainedModel]) -> bool:
        """The model without its ever having been whole, if it can be drawn so; that it cannot is said."""
        mesh = make_mesh(self.arranged, self.device.type)
        group: Any = mesh.get_group("shard")
        try:
            drawn = draw(build, group.rank(), group.size())
        except NotDrawn as error:  # on all ranks, as it depends on nothing else
            self.listener.note(f"every rank draws the whole model before it keeps its part: {error}")
            return False
        self.model = drawn.model
        self.listener.note(str(self.make_outlier_safe(runs=False)))
        if len(set(self.team.assemble(drawn.digest))) > 1:
            raise ModelError("the ranks have drawn other random weights than each other: are they of the same versions?")
        self.mesh, self.structure = mesh, without_memory(self.model)
        cut_whole(self.model, mesh, self.device, drawn.rows)
        require_causal(self.model)
        reshard(self.model)
        return True

    def read_tokenizer(self) -> Any:
        """The one that was asked for; one made of the text is kept in the run directory, where a resumed run finds it."""
        config = self.config
        if config.train_tokenizer is None:
            source = config.tokenizer or (None if config.architecture in LLAMAS else config.architecture)
            if source is None:
                raise ModelError(
                    f"{config.architecture} has no tokenizer of its own: choose one with --tokenizer, or have one made of the "
                    "text with --train-tokenizer 32k."
                )
            return load_tokenizer(source)
        kept = self.out / "tokenizer"

        def make() -> str:
            if is_whole(kept):
                return load_tokenizer(kept).backend_tokenizer.to_str()
            self.listener.note(f"tokenizer: a byte-level BPE of {config.train_tokenizer:,} entries, made of the text")
            texts = documents(config.data, text_field=config.text_field)
            made = train_tokenizer(texts, config.train_tokenizer or 0, between=self.signals.raise_if_set)
            return made.backend_tokenizer.to_str()

        return wrap_tokenizer(Tokenizer.from_str(self.team.shared(make)))

    def read_tokens(self) -> Tokens:
        return read_corpus(self.config, self.tokenizer, vocabulary_size(self.model), self.signals)

    def begin(self) -> dict[str, Any]:
        config, model = self.config, self.model
        compiled, why = decide_compile(config, model, self.device)
        if config.compile == "auto":
            self.listener.note(f"{'compiled' if compiled else 'not compiled'}: {why}")
        lr = config.lr or min(HIGHEST_LR, LR_TIMES_WIDTH / model.config.get_text_config().hidden_size)
        return new_record("pretrain", config, self.tokens, self.fingerprint, compiled, launch=self.team.launch, lr=lr)

    def operate(self) -> None:
        config = self.config
        self.probes, unwatched = outlier_probes(self.model)
        if unwatched:
            self.listener.note(unwatched)
        reshard(self.model)
        self.peak_lr = self.record["lr"]
        if config.lr is None:
            self.listener.note(f"learning rate {self.peak_lr:.2e} (choose with --lr)")
        self.note_optimizer()
        prepare_layers(self.model, config, self.record["compiled"])

    def train(self) -> None:
        config = self.config
        if self.team.first and config.train_tokenizer is not None and not is_whole(self.out / "tokenizer"):
            with atomic_directory(self.out / "tokenizer") as directory:
                self.tokenizer.save_pretrained(directory)
        hooks = Hooks(evaluate=self.evaluate)
        hooks.log.append(self.heard)
        spread = self.over_ranks()
        self.progress = fit(
            self.model, self.windows, NextToken(spread.forward, LateHead(self.model)), config, self.peak_lr, self.out,
            self.device, self.signals, hooks, spread,
        )  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = super().evaluate()
        except NonFiniteError:  # on every rank; where it begins is worth a look
            if self.probes:
                site_kurtosis(self.model, self.probes, self.heldout, self.config.sequences)
            raise
        if self.probes:
            found["kurtosis"] = by_site = site_kurtosis(self.model, self.probes, self.heldout, self.config.sequences)
            found["excess_kurtosis"] = sum(by_site["residual"]) / len(by_site["residual"])
            self.spread.rest()
        return found

    def settle(self) -> None:
        """Of a model in parts: what it is on held-out text, and model/, folded tensor by tensor."""
        config, team, spread = self.config, self.team, self.spread
        if not self.in_parts:
            return
        self.trained = shared_nats(team, self.model, self.heldout, config.sequences, listener=self.listener)
        self.kurtosis = site_kurtosis(self.model, self.probes, self.heldout, config.sequences) if self.probes else {}
        recorded = record(self.model, self.heldout, keep=team.first, floor=False)
        spread.rest()
        target = self.out / "model"
        self.listener.note(f"{target} is read back and compared on the CPU of rank 0, which alone has the model whole")

        def write(read: Callable[[str], Tensor]) -> Written:
            stock = stock_structure(spread.structure)
            plain = plain_parameters(spread.structure, stock, read)
            names = {name for name, _ in stock.named_parameters()}
            require_same_names(names, plain.keys(), type(stock).__name__)
            self.parameters = sum(p.numel() for p in stock.parameters())
            return write_full_precision(stock, self.tokenizer, target, self.heldout, lambda name: plain[name](), recorded)

        self.written = team.together(lambda: spread.gathered(write))
        team.stop_if_asked(self.signals)

    def write(self) -> Written:
        """model/ of a model that this rank has whole, and what it is on held-out text."""
        config, sequences = self.config, self.config.sequences
        with torch.compiler.set_stance("force_eager"):
            stock = fold(self.model.eval())
            self.parameters = sum(p.numel() for p in stock.parameters())
            self.trained = nats(stock, self.heldout, config.sequences, listener=self.listener)
            written = write_full_precision(stock, self.tokenizer, self.out / "model", self.heldout)
            self.kurtosis = site_kurtosis(stock, self.probes, self.heldout, sequences) if self.probes else {}
        return written

    def finish(self) -> PretrainResult:
        """model/, measured and compared with what was trained; pictures."""
        progress, out = self.progress, self.out
        written = self.written or self.write()
        (total, count), kurtosis = self.trained, self.kurtosis
        plot_loss(out)
        if self.probes:
            plot_kurtosis(out)
        residual = kurtosis.get("residual")
        bytes_per_token = self.tokens.heldout_bytes / max(1, len(self.tokens.heldout))
        return PretrainResult(
            out=str(out), model=written.path, steps=progress.step, tokens=progress.tokens, seconds=progress.seconds,
            tokens_per_second=progress.tokens / progress.seconds, nats_per_token=total / count,
            perplexity=perplexity(total / count), bits_per_byte=total / count / math.log(2) / bytes_per_token,
            heldout_tokens=count, excess_kurtosis=sum(residual) / len(residual) if residual else None,
            parameters=self.parameters, model_bytes=written.bytes,
            agreement={k: v for k, v in vars(written.agreement).items() if v is not None} if written.agreement else {},
        )  # fmt: skip
