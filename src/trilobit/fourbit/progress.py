"""Names for what is kept on disk: a hash of all that it follows from, so that nothing is read back that does not fit."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.errors import ModelError, OutputError
from trilobit.fourbit.protocol import Protocol
from trilobit.storage import verify_manifest
from trilobit.tensors import weights_fingerprint

FORMAT = 2
"""Of what is kept: raised where the arithmetic or the files change."""
NO_FUNCTION = ("_name_or_path", "transformers_version", "_attn_implementation", "architectures")


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 of the weights of `model` as they are, and of its config but for where it came from."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in NO_FUNCTION}
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(f"{weights_fingerprint(model)} {text}".encode()).hexdigest()


def windows_fingerprint(windows: Tensor) -> str:
    """sha256 of token ids [N, T], shape included."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: PreTrainedModel, windows: Tensor, protocol: Protocol) -> str:
    """sha256 of `model`, the calibration tokens, and the protocol without the bits of activations and cache, which weights do
    not depend on."""
    parts = FORMAT, model_fingerprint(model), windows_fingerprint(windows), protocol.weights_alone.sha256
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_kept(place: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file that an earlier run kept in `place`. Raises OutputError where they are damaged."""
    try:
        verify_manifest(place)
    except ModelError as error:
        raise OutputError(f"{error} Remove {place}, and it is computed again.") from error
    return load_file(place / name)
