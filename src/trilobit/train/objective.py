"""What a step minimises: next-token loss, and where a teacher is given, the distance to it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.config.tune import TuneConfig
from trilobit.errors import ModelError
from trilobit.surgery.roles import decoder_layers
from trilobit.train.distill import Losses, hidden_distance, mixed_loss
from trilobit.train.head_loss import LateHead, head_loss
from trilobit.train.parts import reshard
from trilobit.train.relations import Recorder, relation_divergence


def frozen_copy(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """The model as it is now, without gradients: a teacher. With bf16 its parameters are bf16."""
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    if precision == "bf16":  # parameters alone: .to() would round the buffers too, and with them RoPE's angles
        for parameter in teacher.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return teacher


class NextToken:
    """Cross-entropy of a micro-batch of token windows [B, T + 1], as the loop calls it. forward: the model, or what stands in
    front of it where several ranks train one. late: the model's head, to be applied in the loss, or None."""

    def __init__(self, forward: Callable[..., Any], late: LateHead | None = None):
        self.forward, self.late = forward, late

    def __call__(self, windows: Tensor, /) -> Losses:
        inputs = {"input_ids": windows[:, :-1], "use_cache": False}
        output, head = self.late(self.forward, **inputs) if self.late else (self.forward(**inputs), None)
        if head is not None:
            return head_loss(output.logits, head, windows[:, 1:], None, 0.0, 1.0)
        return mixed_loss(output.logits, windows[:, 1:], None, 0.0, 1.0)


class TuneObjective:
    """Losses of a micro-batch of token windows [B, T + 1], as the loop calls it. `close` puts the models back as they were.
    forward: what is called for the model, where several ranks train one."""

    def __init__(
        self, config: TuneConfig, model: PreTrainedModel, teacher: PreTrainedModel | None,
        forward: Callable[..., Any] | None = None,
    ):  # fmt: skip
        self.config, self.model, self.teacher = config, model, teacher
        self.forward = forward or model
        self.late = LateHead(model)
        self.late_teacher = None if teacher is None else LateHead(teacher)
        self.recorders: list[Recorder] = []  # of the student and its teacher
        if teacher is not None and config.distill_attention is not None:
            chosen = config.distill_attention_layer
            layer = len(decoder_layers(model)) * 7 // 8 if chosen is None else chosen
            for side in (model, teacher):
                self.recorders.append(Recorder(side, layer))

    def __call__(self, windows: Tensor, /) -> Losses:
        inputs, targets, hidden = windows[:, :-1], windows[:, 1:], self.config.distill_hidden
        options = {"input_ids": inputs, "use_cache": False, "output_hidden_states": hidden is not None}
        student, head = self.late(self.forward, **options)
        teacher = teacher_head = None
        if self.teacher is not None and self.late_teacher is not None:
            with torch.no_grad():
                teacher, teacher_head = self.late_teacher(self.teacher, **options)
        weight, temperature = self.config.distill_weight, self.config.temperature
        if head is not None and (teacher is None or teacher_head is not None):
            other = None if teacher is None or teacher_head is None else (teacher.logits, teacher_head)
            losses = head_loss(student.logits, head, targets, other, weight, temperature)
        else:
            logits = student.logits if head is None else F.linear(student.logits, head)
            target_logits = None if teacher is None else teacher.logits
            if teacher is not None and teacher_head is not None:
                target_logits = F.linear(teacher.logits, teacher_head)
            losses = mixed_loss(logits, targets, target_logits, weight, temperature)
        if hidden is not None and teacher is not None:
            if student.hidden_states is None:
                raise ModelError(f"--distill-hidden: {type(self.model).__name__} gives no hidden states.")
            distance = hidden_distance(student.hidden_states[1:], teacher.hidden_states[1:])
            losses = replace(losses, total=losses.total + hidden * distance, hidden=distance.detach())
        if self.recorders and self.config.distill_attention is not None:
            relations = relation_divergence(*(recorder.take() for recorder in self.recorders))
            total = losses.total + self.config.distill_attention * relations
            losses = replace(losses, total=total, relations=relations.detach())
        return losses

    def close(self) -> None:
        for recorder in self.recorders:
            recorder.close()
        if self.teacher is not None:
            reshard(self.teacher)
