"""The sequences that weights are fitted on: never those that are measured, and the same for everyone with the same text."""

import torch
from torch import Tensor

from trilobit.config.quantize import QuantizeConfig
from trilobit.corpus import documents
from trilobit.errors import ConfigError, DataError
from trilobit.fourbit.protocol import Protocol
from trilobit.infer.load import Loaded
from trilobit.measure.perplexity import require_positions, text_windows, uses_bos

POOL = 8  # windows to choose from, for each that is wanted


def calibration_source(config: QuantizeConfig, protocol: Protocol) -> str:
    """--calibration, or the protocol's text, or `stdlib` (its training part) where that is what is measured. Raises
    ConfigError for none of these, and for the text that is measured."""
    source = config.calibration or protocol.calibration_data or ("stdlib" if config.data == "stdlib" else None)
    if source is None:
        raise ConfigError(
            "GPTQ and SpinQuant are fitted on text: give --calibration (the training part of what --data is the test part "
            "of), or use --method rtn and --rotate none, ffn or quarot."
        )
    if source == config.data != "stdlib":
        raise ConfigError(f"the calibration text is --data ({source}): a model must not be fitted to what is measured.")
    return source


def calibration_windows(loaded: Loaded, config: QuantizeConfig, protocol: Protocol) -> Tensor:
    """Token ids [N, T]: N of the first 8 · N windows of the text (fewer where it is shorter), drawn with the protocol's seed.

    Raises DataError if the text has fewer than N windows, ConfigError if no text is given.
    """
    data, samples, length = calibration_source(config, protocol), protocol.calibration_samples, protocol.calibration_length
    require_positions(loaded.model, length, "--calibration-length")
    texts = (d.text for d in documents(data, text_field=config.text_field, split="train" if data == "stdlib" else None))
    bos = uses_bos(loaded.tokenizer, config.bos)
    pool, _ = text_windows(texts, loaded.tokenizer, length, bos, POOL * samples, "--calibration-length")
    if len(pool) < samples:
        raise DataError(
            f"the calibration text ({data}) is too short: {len(pool)} sequences of {length} tokens, {samples} are needed. "
            "Lower --calibration-samples or --calibration-length, or give more text."
        )
    generator = torch.Generator().manual_seed(protocol.calibration_seed)
    return pool[torch.randperm(len(pool), generator=generator)[:samples]]
