"""Do outliers grow? Excess kurtosis of activations, measured between steps, where they show first: in the residual stream
and in what the MLP's last linear reads (arXiv 2506.19697). `trilobit outliers` measures everything else."""

import math

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trilobit.errors import LAST_UPDATE, ModelError, NonFiniteError
from trilobit.measure.kurtosis import excess_kurtosis
from trilobit.measure.probes import Probe, find_probes, watched
from trilobit.surgery.roles import evaluating

WATCHED = ("residual", "mlp-output")
TOKENS = 4096  # enough for a mean that moves by some per cent


def outlier_probes(model: PreTrainedModel) -> tuple[list[Probe], str]:
    """What is watched, and why that is not all: a model whose parts cannot be told apart is watched at its layers' outputs
    alone, one that cannot be probed not at all."""
    try:
        probes, why = find_probes(model)
    except ModelError as error:
        return [], f"outliers are not watched: {error}"
    return [probe for probe in probes if probe.site in WATCHED], why and f"outliers are watched between layers only: {why}"


def site_kurtosis(model: PreTrainedModel, probes: list[Probe], windows: Tensor, sequences: int) -> dict[str, list[float]]:
    """Mean excess kurtosis after the first position, by layer, for each watched site. windows: [N, T + 1], of which the first
    4,096 tokens' worth are read, `sequences` at a time; the model as it is, uncompiled. A sharded one is called as a whole, as
    its parts cannot be called by themselves. Raises NonFiniteError, naming the first layer and site that is not finite."""
    inputs = windows[: max(1, TOKENS // (windows.shape[1] - 1)), :-1].to(next(model.parameters()).device)
    sums = dict.fromkeys(probes, 0.0)

    def see(probe: Probe, x: Tensor) -> None:
        x = x.reshape(-1, inputs.shape[1], x.shape[-1])[:, 1:]
        sums[probe] += excess_kurtosis(x).sum().item()

    with torch.compiler.set_stance("force_eager"), evaluating(model), watched(model, probes, see):
        for batch in inputs.split(sequences):
            if isinstance(model, FSDPModule):
                model(input_ids=batch, use_cache=False, logits_to_keep=1)
            else:
                model.base_model(input_ids=batch, use_cache=False)
    count = len(inputs) * (inputs.shape[1] - 1)
    found: dict[str, list[float]] = {}
    if bad := sorted((probe.layer or 0, probe.site) for probe in probes if not math.isfinite(sums[probe])):
        raise NonFiniteError(f"activations are not finite, first in layer {bad[0][0]}, {bad[0][1]}. {LAST_UPDATE}")
    for probe in sorted(probes, key=lambda probe: (WATCHED.index(probe.site), probe.layer or 0)):
        found.setdefault(probe.site, []).append(float(f"{sums[probe] / count:.4g}"))
    return found
