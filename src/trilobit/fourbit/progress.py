"""Names for what is kept on disk: a hash of all that it follows from, so that nothing is read back that does not fit."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.fourbit.protocol import Protocol


def fingerprint(model: PreTrainedModel, windows: Tensor, protocol: Protocol) -> str:
    """sha256 of the weights of `model` as they are, the calibration tokens, and the protocol without the bits of activations
    and cache, which weights do not depend on."""
    digest = hashlib.sha256(json.dumps(asdict(protocol.weights_alone), sort_keys=True).encode())
    digest.update(windows.numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        data: Any = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()
