"""`trilobit tune`: an ordinary checkpoint in, a ternary one out, and everything about how it came to be beside it.

out/run.json         configuration, versions, seed, the schedule by value, what became what, results
out/log.jsonl        one row a step
out/checkpoints/     step-N: what --resume continues from, bit for bit
out/latent/          trainable fp32 latents
out/model/           the ternary model, read back and compared before it got its name (export/hf.py)
out/loss.png, out/lambda.png, out/flips.png
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.config.tune import TuneConfig
from trilobit.errors import ModelError
from trilobit.export.forms import require_form, stored_precision
from trilobit.export.hf import Written, round_kept, write_full_precision, write_latent, write_model, write_source
from trilobit.export.source import Source, StoredSource
from trilobit.export.verify import record
from trilobit.infer.load import load_pretrained
from trilobit.listener import SILENT, Listener
from trilobit.measure.perplexity import perplexity, require_positions
from trilobit.nn.ternary import ternary_modules
from trilobit.surgery.roles import find_roles
from trilobit.surgery.single_scale import hold_single_scales, release_single_scales, single_scale_norms, stock_gain
from trilobit.surgery.ternary import Plan, apply_plan, make_plan, set_gains, set_strengths
from trilobit.tensors import weights_fingerprint
from trilobit.train.begin import CALIBRATION_WINDOWS, calibrate, require_as_it_is, schedules_of, spec_of
from trilobit.train.checkpoint import list_checkpoints
from trilobit.train.data import Tokens
from trilobit.train.evaluate import compared_windows, shared_nats
from trilobit.train.flips import watch_flips
from trilobit.train.layers import decide_compile, prepare_layers, set_attention
from trilobit.train.loop import Hooks, fit
from trilobit.train.mesh import make_mesh
from trilobit.train.objective import TuneObjective, frozen_copy
from trilobit.train.original import Original, open_for_ranks
from trilobit.train.parts import reshard, without_memory
from trilobit.train.plots import plot_flips, plot_loss, plot_strengths
from trilobit.train.reconstruct import reconstruct
from trilobit.train.record import new_record
from trilobit.train.run import Run, start
from trilobit.train.schedule import StrengthSchedule
from trilobit.train.sensitivity import layer_costs
from trilobit.train.text import read_tokens
from trilobit.train.tune_result import TuneResult

DECIDED = frozenset({"base_nats_per_token", "gains", "schedules"})
LR_TIMES_ROOT_WIDTH = 0.03  # the best of rates a factor of two apart at widths 64, 192, 576: 5e-3, 2e-3, 2e-3
FORWARDS = 3  # that a token of training costs, its backward included; one more for a teacher


def run(config: TuneConfig, listener: Listener = SILENT) -> TuneResult:
    """Tune `config.model` as configured. Raises a TrilobitError that says what to do, and leaves nothing half-written."""
    return start(_Tune, config, Path(config.model).absolute().name, listener, DECIDED)


class _Tune(Run[TuneConfig, TuneResult]):
    """A checkpoint's way to a ternary model."""

    result_type = TuneResult
    teacher: PreTrainedModel | None = None
    original: Original | None = None
    obstacle = ""
    ternary_parameters = 0
    own_attention: Any = None

    @property
    def whole_bytes(self) -> int:
        learns = self.config.learns_from_original
        return super().whole_bytes + learns * (2 if self.config.precision == "bf16" else 4)

    def load(self, record: dict[str, Any] | None) -> None:
        """The original model, whole or in parts, and what the surgery will make of it."""
        config = self.config
        self.listener.note(f"model: {config.model}")
        self.held: dict[str, nn.Module] = {}
        self.original = self.open_in_parts()
        if self.original is None:
            self.base = load_pretrained(config.model, trainable=True)
            self.base.model.to(self.device)  # pyright: ignore[reportArgumentType]
            self.choose_attention(self.base.model)
            self.fingerprint = weights_fingerprint(self.base.model)
        else:
            self.base, self.fingerprint = self.original.loaded(), self.original.fingerprint()
        self.model = self.base.model
        cast(nn.Embedding, self.model.get_input_embeddings()).padding_idx = None  # windows have none: it ends texts, and learns
        require_positions(self.model, config.sequence_length)
        if self.base.plan is not None:
            require_as_it_is(config, self.base.plan)
            self.plan = self.base.plan
        else:
            self.plan = None if config.schedule == "never" else make_plan(find_roles(self.model), spec_of(config))
            reshard(self.model)
        if self.plan is not None:
            require_form(Source(self.model, self.plan), config.model_format)
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.arrangement is None and self.arrange(parameters).in_parts:
            self.listener.note(f"every rank loads the whole model before it keeps its part: {self.obstacle}")
        self.base_bytes = parameters * 2  # as bf16, as checkpoints are published
        if record is not None and record["base"] != self.fingerprint:
            raise ModelError(
                f"the weights of {config.model} have changed since {self.out} began; --resume needs the same ones."
            )

    def open_in_parts(self) -> Original | None:
        """The original in parts, where the ranks share the model so, and its checkpoint can be read so."""
        config, team = self.config, self.team
        if team.size == 1 or config.mesh == "ddp":
            return None
        opened, self.obstacle = open_for_ranks(config.model, team)
        if opened is None or not self.arrange(sum(p.numel() for p in opened.model.parameters())).in_parts:
            return None
        self.choose_attention(opened.model)
        self.mesh = make_mesh(self.arranged, self.device.type)
        return Original(opened, self.mesh, self.device)

    def choose_attention(self, model: PreTrainedModel) -> None:
        """The one that was asked for, if any; the model's own is remembered."""
        self.own_attention = model.config._attn_implementation
        if self.config.attention is not None:
            set_attention(model, self.config.attention)

    def read_tokens(self) -> Tokens:
        return read_tokens(self.config, self.base, self.signals)

    def measure(self) -> None:
        """The original's loss, and where the surgery will start from it."""
        config, model, plan = self.config, self.model, self.plan
        start = time.perf_counter()
        # fp32, like the final measurement
        total, count = shared_nats(self.team, model, self.heldout, config.sequences, listener=self.listener)
        self.forecast.guess(count / (time.perf_counter() - start), FORWARDS + config.learns_from_original)
        if not math.isfinite(total):
            raise ModelError(f"{config.model} itself has a loss of {total} on held-out text: its weights are damaged.")
        self.base_nats = total / count
        self.gains = {} if self.base.plan else calibrate(config, plan, model, self.windows, self.device)
        self.single_scale = single_scale_norms(model, plan) if plan else []
        reshard(model)

    def begin(self) -> dict[str, Any]:
        """run.json of a new run: everything that depends on the original decided."""
        config, model = self.config, self.model
        compiled, why = decide_compile(config, model, self.device)
        if config.compile == "auto":
            self.listener.note(f"{'compiled' if compiled else 'not compiled'}: {why}")
        return new_record(
            "tune", config, self.tokens, self.fingerprint, compiled,
            launch=self.team.launch, lr=config.lr or LR_TIMES_ROOT_WIDTH / model.config.get_text_config().hidden_size ** 0.5,
            base_nats_per_token=self.base_nats,
            schedules=[asdict(schedule) for schedule in self.plan_schedules(self.gains)],
            gains=self.gains,
            single_scale=self.single_scale,
            plan=self.plan.to_json() if self.plan else None,
        )  # fmt: skip

    def plan_schedules(self, gains: dict[str, float]) -> list[StrengthSchedule]:
        """λ of weights, λ of activations."""
        config, plan = self.config, self.plan
        costs: list[float] = []
        if plan is not None and "sensitivity" in (config.schedule, config.activation_schedule):
            costs = layer_costs(self.model, plan, gains, self.windows.samples(0, CALIBRATION_WINDOWS), config.sequences)
            self.listener.note("quantising one layer alone costs, in nats: " + ", ".join(f"{cost:.2f}" for cost in costs))
        return schedules_of(config, self.layers(), costs)

    def operate(self) -> None:
        """The teacher, if one is needed, and the surgery."""
        config, base_nats = self.config, self.record["base_nats_per_token"]
        self.schedules = [StrengthSchedule.from_json(value) for value in self.record["schedules"]]
        self.listener.note(f"original model: {base_nats:.4f} nats per token held out (perplexity {perplexity(base_nats):.2f})")
        if config.learns_from_original or config.reconstruct_tokens is not None:
            if self.original is None:
                self.teacher = frozen_copy(self.model, config.precision)
            else:
                self.teacher = self.original.teacher(config.precision)
            if config.attention is not None and config.distill_attention is None:  # forward alone, other things are fast
                set_attention(self.teacher, self.own_attention)
        if self.plan is not None:
            student = self.model if self.original is None else self.original.opened.structure()
            if self.base.plan is None:
                self.listener.note(str(apply_plan(student, self.plan)))
            else:
                self.listener.note(f"{config.model} is ternary already ({self.base.form}): it is trained on at λ = 1")
            self.hold_single_scales(student, self.record.get("single_scale", []))  # older runs trained them channel by channel
            if self.original is not None:
                self.structure = without_memory(student)
                self.model = self.original.student(student, list(self.held))
            set_gains(self.model, self.record["gains"])
            owned = {id(p): p.numel() for _, m in ternary_modules(self.model) for p in m.parameters(recurse=False)}
            self.ternary_parameters = sum(owned.values())
            self.listener.note(f"weights: {self.schedules[0].describe()}")
            if self.schedules[1] != self.schedules[0] and config.activations == "int8":
                self.listener.note(f"activations: {self.schedules[1].describe()}")
            if config.ramp_fraction == 1 and config.schedule not in ("immediate", "never"):
                self.listener.note("--ramp-fraction 1: λ is 1 only after the last step: the finished model is never trained")
        elif self.original is not None:
            self.structure = self.original.opened.structure()
        self.base.model, self.original = self.model, None
        gc.collect()  # parts of a model refer to each other in circles: without this the original's would stay
        self.model.requires_grad_(True)
        self.peak_lr = self.record["lr"]
        if config.lr is None:
            self.listener.note(f"learning rate {self.peak_lr:.2e}: {LR_TIMES_ROOT_WIDTH} / √hidden size (choose with --lr)")
        self.note_optimizer()
        prepare_layers(self.model, config, self.record["compiled"])
        self.objective().close()  # what it refuses is refused before anything is written

    def hold_single_scales(self, student: PreTrainedModel, paths: list[str]) -> None:
        """Train block norms as one scale each, where that was decided."""
        self.held = hold_single_scales(student, paths)
        if paths:
            self.listener.note(
                f"{len(paths)} block norms have one gain for all channels and stand in front of scalar gains: each is trained "
                "as one scale, so that two norms in a row remain one (which llama.cpp's bitnet graph holds)"
            )

    def objective(self, forward: Callable[..., Any] | None = None) -> TuneObjective:
        teacher = self.teacher if self.config.learns_from_original else None
        return TuneObjective(self.config, self.model, teacher, forward)

    def train(self) -> None:
        """The warm start, if there is one and no checkpoint follows it, and all steps."""
        config = self.config
        if config.reconstruct_tokens is not None and not list_checkpoints(self.out):
            torch.manual_seed(config.seed)  # dropout, where a model has it
            self.reconstruct(config.reconstruct_tokens)
        spread = self.over_ranks(self.teacher)
        objective = self.objective(spread.forward)
        self.teacher = None
        hooks = Hooks(self.before_step, self.evaluate, (lambda: watch_flips(self.model)) if self.plan else None)
        hooks.log.append(self.heard)
        try:
            self.progress = fit(
                self.model, self.windows, objective, config, self.peak_lr, self.out, self.device, self.signals, hooks, spread
            )  # fmt: skip
        finally:
            objective.close()

    def reconstruct(self, tokens: int) -> None:
        """On the first windows of the training order."""
        assert self.teacher is not None

        def after_layer(layer: int, before: float, after: float) -> None:
            self.listener.note(f"layer {layer}: relative error of its output {before:.4f} → {after:.4f}")
            self.signals.raise_if_set()

        size = self.config.sequences
        batches = range(tokens // (size * self.config.sequence_length))
        samples = [self.windows.samples(index * size, size)[:, :-1] for index in batches]
        reconstruct(self.model.train(), self.teacher, samples, self.peak_lr, self.config.precision, after_layer)

    def before_step(self, tokens: int) -> dict[str, float]:
        """Set λ of every layer; what is logged of it."""
        if self.plan is None:
            return {"lambda": 0.0, "lambda_activations": 0.0}
        weights, activations = (schedule.at(tokens) for schedule in self.schedules)
        set_strengths(self.model, weights, activations)
        return {"lambda": sum(weights) / len(weights), "lambda_activations": sum(activations) / len(activations)}

    def settle(self) -> None:
        """latent/, and what the finished model is on held-out text."""
        config, team, model, plan, spread = self.config, self.team, self.model, self.plan, self.spread
        stored = spread.structure  # with the stock norms that held ones stand for
        if self.in_parts:
            for path, norm in self.held.items():
                stored.set_submodule(path, without_memory(norm))
        else:
            release_single_scales(model, self.held)
            self.held = {}
        # What was compiled for training must not be compiled again for the batches that measure and compare.
        with torch.compiler.set_stance("force_eager"):
            if plan is not None:
                layers = self.layers()
                set_strengths(model, [1.0] * layers, [1.0] * layers)
            team.together(lambda: spread.gathered(self.write_latent))
            if plan is not None and config.model_format != "none":
                store: Any = team.shared(lambda: stored_precision(self.source(plan), config.model_format, config.store))
                round_kept(stored, plan, store, {piece.name: piece.local.detach() for piece in spread.pieces})
            self.trained = shared_nats(team, model, self.heldout, config.sequences, listener=self.listener)
            if self.in_parts and config.model_format != "none":
                self.recorded = record(model, self.compared(), keep=team.first)
                spread.rest()
        team.stop_if_asked(self.signals)

    def write_latent(self, read: Callable[[str], Tensor]) -> None:
        def stock(name: str) -> Tensor:
            path = name.rpartition(".")[0]
            return stock_gain(self.held[path], read(f"{path}.weight")) if path in self.held else read(name)

        write_latent(self.spread.structure, self.plan, self.base.tokenizer, self.out / "latent", stock)

    def source(self, plan: Plan) -> Source:
        """The trained model, tensor by tensor: rank 0 has it whole, or in latent/."""
        if not self.in_parts:
            return Source(self.model, plan, self.base.tokenizer)
        source = StoredSource(self.out / "latent")
        source.tokenizer = self.base.tokenizer
        return source

    def finish(self) -> TuneResult:
        """model/, compared; pictures."""
        config, plan, out, progress, (total, count) = self.config, self.plan, self.out, self.progress, self.trained
        with torch.compiler.set_stance("force_eager"):
            written = self.write()
        base_nats = self.record["base_nats_per_token"]
        plot_loss(out, base_nats)
        plot_strengths(out, self.schedules[0], config.max_tokens)
        if plan is not None:
            plot_flips(out)
        return TuneResult(
            out=str(out), model=written.path, form=written.form, reason=written.reason, steps=progress.step,
            tokens=progress.tokens, seconds=progress.seconds, tokens_per_second=progress.tokens / progress.seconds,
            base_nats_per_token=base_nats, nats_per_token=total / count, base_perplexity=perplexity(base_nats),
            perplexity=perplexity(total / count), heldout_tokens=count,
            parameters=sum(p.numel() for p in self.spread.structure.parameters()),
            ternary_parameters=self.ternary_parameters, base_bytes=self.base_bytes, model_bytes=written.bytes,
            agreement=asdict(written.agreement) if written.agreement else {},
        )  # fmt: skip

    def write(self) -> Written:
        """model/, in the form that was asked for."""
        config, tokenizer, target = self.config, self.base.tokenizer, self.out / "model"
        if config.model_format == "none":
            return Written(str(self.out / "latent"), "latent", "as asked", 0, None)
        compared = self.compared()
        if not self.in_parts:
            if self.plan is None:
                return write_full_precision(self.model, tokenizer, target, compared)
            return write_model(self.model, self.plan, tokenizer, target, compared, config.model_format, config.store)
        self.listener.note(f"{target} is read back and compared on the CPU of rank 0, which alone has the model whole")
        if self.plan is None:
            source = StoredSource(self.out / "latent")
            return write_full_precision(source.model, tokenizer, target, compared, source.tensor, self.recorded)
        return write_source(self.source(self.plan), self.recorded, target, compared, config.model_format, config.store)

    def compared(self) -> Tensor:
        """Token windows that model/ is compared with what was trained on."""
        config = self.config
        if self.plan is None:
            return self.heldout
        return compared_windows(config, self.tokens, self.windows)
