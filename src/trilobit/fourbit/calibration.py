"""The sequences that weights are fitted on: never those that are measured, and the same for everyone with the same text."""

import torch
from torch import Tensor

from trilobit.config.quantize import QuantizeConfig
from trilobit.corpus import documents, overlap
from trilobit.errors import ConfigError, DataError, ModelError
from trilobit.fourbit.protocol import Protocol
from trilobit.infer.loaded import Loaded
from trilobit.measure.perplexity import require_positions, text_windows, uses_bos
from trilobit.surgery.roles import vocabulary_size

POOL = 8  # windows to choose from, for each that is wanted
TELLING = 32  # tokens: shorter pieces of two texts may be equal by chance


def calibration_source(config: QuantizeConfig, protocol: Protocol) -> str:
    """--calibration, or the protocol's text, or `stdlib` (its training part) where that is what is measured. Raises
    ConfigError for none of these, and for the text that is measured, however its path is spelt."""
    source = config.calibration or protocol.calibration_data or ("stdlib" if config.data == "stdlib" else None)
    if source is None:
        raise ConfigError(
            "GPTQ and SpinQuant are fitted on text: give --calibration (the training part of what --data is the test part "
            "of), or use --method rtn and --rotate none, ffn or quarot."
        )
    if source == config.data != "stdlib" or _overlap(source, config.data):
        raise ConfigError(
            f"the calibration text ({source}) is in --data ({config.data}): a model must not be fitted to what is measured."
        )
    return source


def _overlap(source: str, data: str) -> bool:
    try:
        return overlap(source, data)
    except DataError:  # said when the text is read
        return False


def calibration_windows(loaded: Loaded, config: QuantizeConfig, protocol: Protocol) -> Tensor:
    """Token ids [N, T]: N of the first 8 · N windows of the text (fewer where it is shorter), drawn with the protocol's seed.

    Raises DataError if the text is missing or has fewer than N windows, ConfigError if none is given, ModelError for tokens
    beyond the model's embedding.
    """
    data, samples, length = calibration_source(config, protocol), protocol.calibration_samples, protocol.calibration_length
    require_positions(loaded.model, length, "--calibration-length")
    texts = (d.text for d in documents(data, text_field=config.text_field, split="train" if data == "stdlib" else None))
    bos = uses_bos(loaded.tokenizer, config.bos)
    try:
        pool, _ = text_windows(texts, loaded.tokenizer, length, bos, POOL * samples, "--calibration-length")
    except DataError as error:
        raise DataError(f"the calibration text ({data}): {error}") from error
    if len(pool) < samples:
        raise DataError(
            f"the calibration text ({data}) is too short: {len(pool)} sequences of {length} tokens, {samples} are needed. "
            "Lower --calibration-samples or --calibration-length, or give more text."
        )
    generator = torch.Generator().manual_seed(protocol.calibration_seed)
    drawn = pool[torch.randperm(len(pool), generator=generator)[:samples]]
    if int(drawn.max()) >= vocabulary_size(loaded.model):
        raise ModelError(f"the calibration text has token {int(drawn.max())}, beyond the model's embedding.")
    return drawn


def require_apart(drawn: Tensor, measured: Tensor) -> None:
    """Raise DataError if a sequence of drawn [N, T] is one of measured [M, W], over the tokens that both have."""
    width = min(drawn.shape[1], measured.shape[1])
    if width < TELLING:
        return
    seen = {tuple(row) for row in measured[:, :width].tolist()}
    if any(tuple(row) in seen for row in drawn[:, :width].tolist()):
        raise DataError(
            "a calibration sequence is one of those that are measured: the two texts have a part in common. Give --calibration "
            "a text of its own."
        )
