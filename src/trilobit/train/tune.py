"""`trilobit tune`: an ordinary checkpoint in, a ternary one out, and everything about how it came to be beside it.

out/run.json         configuration, versions, seed, the schedule by value, what became what, results
out/log.jsonl        one row a step
out/checkpoints/     step-N: what --resume continues from, bit for bit
out/latent/          trainable fp32 latents
out/model/           the ternary model, read back and compared before it got its name (export/hf.py)
out/loss.png, out/lambda.png
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError, DataError, ModelError, OutputError
from trilobit.export.hf import require_form, round_kept, stored_precision, write_full_precision, write_latent, write_model
from trilobit.infer.generate import sample_documents
from trilobit.infer.load import Loaded, load_pretrained, pick_device
from trilobit.listener import SILENT, Listener
from trilobit.measure.perplexity import nats, perplexity, require_positions
from trilobit.storage import require_free_space, require_new_directory, write_json
from trilobit.surgery.roles import decoder_layers, find_roles, vocabulary_size
from trilobit.surgery.ternary import Plan, TernarySpec, apply_plan, make_plan, measure_rms, set_gains, set_strengths
from trilobit.train.checkpoint import BYTES_PER_PARAMETER, list_checkpoints
from trilobit.train.data import Tokens, from_tokens, prepare
from trilobit.train.distill import Losses, mixed_loss
from trilobit.train.layers import decide_compile, prepare_layers
from trilobit.train.loop import Hooks, Signals, autocast, fit
from trilobit.train.plots import plot_loss, plot_strengths
from trilobit.train.reconstruct import reconstruct
from trilobit.train.record import new_record, record_to_resume, weights_fingerprint
from trilobit.train.relations import Recorder, relation_divergence
from trilobit.train.schedule import StrengthSchedule, strength_schedule
from trilobit.train.track import Track, tracker
from trilobit.train.windows import Windows, evaluation_windows

LR_TIMES_WIDTH = 0.4
CALIBRATION_WINDOWS = 8
HELDOUT_TOKENS = 262_144


@dataclass(frozen=True)
class TuneResult:
    """What a run gave. Nats are per token on the held-out windows; `base_` is the original model on the same windows."""

    out: str
    model: str
    form: str
    reason: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    base_nats_per_token: float
    nats_per_token: float
    base_perplexity: float
    perplexity: float
    heldout_tokens: int
    parameters: int
    ternary_parameters: int
    base_bytes: int
    model_bytes: int
    agreement: dict[str, float]


def run(config: TuneConfig, listener: Listener = SILENT) -> TuneResult:
    """Tune `config.model` as configured. Raises a TrilobitError that says what to do, and leaves nothing half-written."""
    with Signals().watch() as signals:
        return _run(config, listener, signals)


def _run(config: TuneConfig, listener: Listener, signals: Signals) -> TuneResult:
    device = pick_device(config.device)
    out = Path(config.out or f"out/{Path(config.model).absolute().name}")
    record = record_to_resume(out, config) if config.resume else None
    if record is None:
        require_new_directory(out, f"Continue it with --resume, or choose another name with --out {out}-2.")
    elif "result" in record:
        raise OutputError(f"{out} has finished already; its model is in {out / 'model'}.")

    with tracker(config.track, out, asdict(config)) as track:
        return _tune(config, listener, signals, track, device, out, record)


def _tune(
    config: TuneConfig, listener: Listener, signals: Signals, track: Track, device: torch.device, out: Path,
    record: dict[str, Any] | None,
) -> TuneResult:  # fmt: skip
    base = load_pretrained(config.model)
    model = base.model
    model.to(device)  # pyright: ignore[reportArgumentType]
    require_positions(model, config.sequence_length)
    plan = None if config.schedule == "never" else make_plan(find_roles(model), _spec(config))
    if plan is not None:
        require_form(plan, model, config.model_format)
    base_bytes = sum(p.numel() * 2 for p in model.parameters())  # as bf16, the way checkpoints are published
    if record is not None and record["base"] != weights_fingerprint(model):
        raise ModelError(f"the weights of {config.model} have changed since {out} began; --resume needs the same ones.")
    signals.raise_if_set()

    tokens = _tokens(config, base, signals)
    listener.note(f"data: {tokens.description}")
    windows = Windows(tokens.train, config.sequence_length, config.seed)
    heldout = evaluation_windows(tokens.heldout, config.sequence_length, config.eval_tokens)
    seen = config.steps * config.tokens_per_step
    if seen > windows.count * config.sequence_length:
        listener.note(f"the data is seen {seen / (windows.count * config.sequence_length):.1f} times")
    signals.raise_if_set()

    def evaluate() -> dict[str, float]:
        total, count = nats(model, heldout, config.sequences, config.precision)
        return {"heldout_nats": total / count}

    teacher = None
    if config.distill == "logits" or config.reconstruct_tokens is not None:
        teacher = copy.deepcopy(model)
        teacher.requires_grad_(False).eval()
        if config.precision == "bf16":  # parameters alone: .to() would round the buffers too, and with them RoPE's angles
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
    if record is None:
        total, count = nats(model, heldout, config.sequences)  # in fp32, like the final measurement
        base_nats = total / count
        if not math.isfinite(base_nats):
            raise ModelError(f"{config.model} itself has a loss of {base_nats} on held-out text: its weights are damaged.")
        schedules = _schedules(config, len(decoder_layers(model)))
        rms = _calibrate(config, plan, model, windows, device)
        compiled, why = decide_compile(config, model, device)
        if config.compile == "auto":
            listener.note(f"{'compiled' if compiled else 'not compiled'}: {why}")
        record = new_record(config, plan, schedules, rms, base_nats, tokens, weights_fingerprint(model), compiled)
    else:
        if record["data_key"] != tokens.key:
            raise DataError(f"the text of --data {config.data} has changed since {out} began; --resume needs the same text.")
        base_nats, rms = record["base_nats_per_token"], record["gains"]
        schedules = [StrengthSchedule.from_json(value) for value in record["schedules"]]
    signals.raise_if_set()
    listener.note(f"original model: {base_nats:.4f} nats per token held out (perplexity {perplexity(base_nats):.2f})")

    ternary_parameters = 0
    if plan is not None:
        surgery = apply_plan(model, plan)
        set_gains(model, rms)
        listener.note(str(surgery))
        ternary_parameters = sum(row.parameters for row in surgery.rows if row.became.startswith("ternary"))
        listener.note(f"weights: {schedules[0].describe()}")
        if schedules[1] != schedules[0] and config.activations == "int8":
            listener.note(f"activations: {schedules[1].describe()}")
        if config.ramp_fraction == 1 and config.schedule not in ("immediate", "never"):
            listener.note("--ramp-fraction 1: λ is 1 only after the last step, so the finished model is never itself trained")
    parameters = sum(p.numel() for p in model.parameters())
    peak_lr = config.lr or LR_TIMES_WIDTH / model.config.get_text_config().hidden_size
    if config.lr is None:
        listener.note(f"learning rate {peak_lr:.2e}: {LR_TIMES_WIDTH} / hidden size (choose with --lr)")
    model.requires_grad_(True)
    prepare_layers(model, config, record["compiled"])

    require_free_space(out, (config.keep_checkpoints + 1) * BYTES_PER_PARAMETER * parameters, "The run")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}.") from error
    write_json(out / "run.json", record)

    if config.reconstruct_tokens is not None and teacher is not None and not list_checkpoints(out):
        _reconstruct(config, model, teacher, windows, peak_lr, signals, listener)
    if config.distill == "none":
        teacher = None

    def before_step(seen: int) -> dict[str, float]:
        if plan is None:
            return {"lambda": 0.0, "lambda_activations": 0.0}
        weights, activations = schedules[0].at(seen), schedules[1].at(seen)
        set_strengths(model, weights, activations)
        return {"lambda": sum(weights) / len(weights), "lambda_activations": sum(activations) / len(activations)}

    recorders: list[Recorder] = []  # of the student and its teacher
    if teacher is not None and config.distill_attention is not None:
        chosen = config.distill_attention_layer
        layer = len(decoder_layers(model)) * 7 // 8 if chosen is None else chosen
        recorders = [Recorder(model, layer), Recorder(teacher, layer)]

    def objective(batch: Tensor) -> Losses:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = model(input_ids=inputs, use_cache=False).logits
        target_logits = None
        if teacher is not None:
            with torch.no_grad():
                target_logits = teacher(input_ids=inputs, use_cache=False).logits
        losses = mixed_loss(logits, targets, target_logits, config.distill_weight, config.temperature)
        if recorders and config.distill_attention is not None:
            student, original = (recorder.take() for recorder in recorders)
            losses.relations = relation_divergence(student, original)
            losses.total = losses.total + config.distill_attention * losses.relations
            losses.relations = losses.relations.detach()
        return losses

    hooks = Hooks(before_step, evaluate)
    hooks.log += [track, lambda row: listener.row(row, config.max_tokens)]
    progress = fit(model, windows, objective, config, peak_lr, out, device, signals, hooks)

    for recorder in recorders:
        recorder.close()
    # What was compiled for training must not be compiled again for the batches that measure and compare.
    with torch.compiler.set_stance("force_eager"):
        if plan is not None:
            layers = len(schedules[0].starts)
            set_strengths(model, [1.0] * layers, [1.0] * layers)
        write_latent(model, plan, base.tokenizer, out / "latent")
        if plan is not None and config.model_format != "none":
            round_kept(model, plan, stored_precision(plan, model, config.model_format, config.store))
        total, count = nats(model, heldout, config.sequences)
        signals.raise_if_set()
        if config.model_format == "none":
            written = None
        elif plan is None:
            written = write_full_precision(model, base.tokenizer, out / "model", heldout)
        else:
            written = write_model(model, plan, base.tokenizer, out / "model", heldout, config.model_format, config.store)
    plot_loss(out, base_nats)
    plot_strengths(out, schedules[0], config.max_tokens)
    result = TuneResult(
        out=str(out), model=written.path if written else str(out / "latent"), form=written.form if written else "latent",
        reason=written.reason if written else "as asked", steps=progress.step,
        tokens=progress.tokens, seconds=progress.seconds, tokens_per_second=progress.tokens / progress.seconds,
        base_nats_per_token=base_nats, nats_per_token=total / count, base_perplexity=perplexity(base_nats),
        perplexity=perplexity(total / count), heldout_tokens=count, parameters=parameters,
        ternary_parameters=ternary_parameters, base_bytes=base_bytes, model_bytes=written.bytes if written else 0,
        agreement=asdict(written.agreement) if written else {},
    )  # fmt: skip
    write_json(out / "run.json", record | {"result": asdict(result)})
    return result


def _spec(config: TuneConfig) -> TernarySpec:
    return TernarySpec(
        placement=config.placement, gain=config.gain, activations=config.activations, scale=config.scale,
        cover=config.cover, dead_zone_bias=config.dead_zone_bias or 0.0, learned_ranges=config.learned_ranges,
    )  # fmt: skip


def _schedules(config: TuneConfig, layers: int) -> list[StrengthSchedule]:
    """λ of weights, λ of activations."""
    weights = strength_schedule(config.schedule, layers, config.max_tokens, config.ramp_fraction, config.overlap)
    activations = strength_schedule(
        config.activation_schedule or config.schedule, layers, config.max_tokens,
        config.activation_ramp_fraction or config.ramp_fraction, config.overlap,
    )  # fmt: skip
    return [weights, activations]


def _tokens(config: TuneConfig, base: Loaded, signals: Signals) -> Tokens:
    model, tokenizer = base.model, base.tokenizer
    vocabulary = vocabulary_size(model)
    cache = Path(config.cache_dir) if config.cache_dir else None
    needed = config.max_tokens + config.sequence_length + 1
    if config.data != "self":
        return prepare(
            config.data, tokenizer, vocab_size=vocabulary, text_field=config.text_field, max_tokens=needed,
            sequence_length=config.sequence_length, heldout_tokens=max(HELDOUT_TOKENS, config.eval_tokens), cache_dir=cache,
            progress=lambda size, count: signals.raise_if_set(),
        )  # fmt: skip
    end: Any = tokenizer.eos_token_id
    start: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if start is None:
        raise ConfigError("--data self: this tokenizer has no beginning-of-text or end-of-text token to start from.")
    # the last document held out ends past eval_tokens
    wanted = (config.self_tokens or needed) + config.eval_tokens + config.sequence_length
    key = f"self {weights_fingerprint(model)} {wanted} {config.sequence_length}"

    def make() -> Iterator[Any]:
        for document in sample_documents(model, start, end, wanted, config.sequence_length, 0):
            signals.raise_if_set()
            yield document

    return from_tokens(
        key, make, tokenizer, vocab_size=vocabulary, heldout_tokens=config.eval_tokens,
        sequence_length=config.sequence_length, cache_dir=cache,
    )  # fmt: skip


def _reconstruct(
    config: TuneConfig, model: PreTrainedModel, teacher: PreTrainedModel, windows: Windows, lr: float, signals: Signals,
    listener: Listener,
) -> None:  # fmt: skip
    """The warm start, on the first windows of the training order."""
    assert config.reconstruct_tokens is not None

    def after_layer(layer: int, before: float, after: float) -> None:
        listener.note(f"layer {layer}: relative error of its output {before:.4f} → {after:.4f}")
        signals.raise_if_set()

    count = config.reconstruct_tokens // (config.sequences * config.sequence_length)
    samples = [windows.samples(index * config.sequences, config.sequences)[:, :-1] for index in range(count)]
    model.train()
    reconstruct(model, teacher, samples, lr, config.precision, after_layer)


def _calibrate(
    config: TuneConfig, plan: Plan | None, model: PreTrainedModel, windows: Windows, device: torch.device
) -> dict[str, float]:
    """Measured RMS of the inputs that get a norm, over the first windows of the training order."""
    if plan is None or config.gain_init == "ones":
        return {}
    batch = windows.samples(0, CALIBRATION_WINDOWS)[:, :-1].to(device)
    normed = [path for path, linear in plan.linears.items() if linear.normed]
    with autocast(config.precision, device):
        return measure_rms(model, normed, batch.split(2))
