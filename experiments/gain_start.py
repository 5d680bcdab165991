"""What an inserted norm's gain should start from: loss of a model with norms before every projection, no quantisation.

    python experiments/gain_start.py MODEL --data TEXT

Prints the table of docs/math.md: gains fitted on 4 windows of 256 tokens, loss on 8 others.
"""

import argparse

import torch
from torch import Tensor, nn

from trilobit.infer.load import load
from trilobit.measure.perplexity import nats
from trilobit.surgery.roles import find_roles, vocabulary_size
from trilobit.surgery.ternary import TernarySpec, apply_plan, make_plan, set_strengths
from trilobit.train.data import prepare
from trilobit.train.windows import evaluation_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    model = loaded.model
    vocabulary = vocabulary_size(model)
    tokens = prepare(arguments.data, loaded.tokenizer, vocab_size=vocabulary)
    windows = evaluation_windows(tokens.train, 256, 12 * 256)
    fitted, held = windows[:4], windows[4:]
    plan = make_plan(find_roles(model), TernarySpec(placement="every"))

    gains: dict[str, dict[str, Tensor]] = {}

    def measure(path: str):
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            rms = x.pow(2).mean(dim=-1, keepdim=True).sqrt()
            unit = x / rms
            gains[path] = {
                "ones": torch.ones(()),
                "root mean square over tokens": rms.pow(2).mean().sqrt(),
                "least squares per channel": (x * unit).sum(0) / unit.pow(2).sum(0),
                "mean of per-token RMS": rms.mean(),
                "geometric mean": rms.log().mean().exp(),
                "median": rms.median(),
            }

        return before

    handles = [model.get_submodule(path).register_forward_pre_hook(measure(path)) for path in plan.linears]
    with torch.no_grad():
        model(input_ids=fitted[:, :-1], use_cache=False)
    for handle in handles:
        handle.remove()
    total, count = nats(model, held, 4)
    print(f"{'original':<32}{total / count:.3f}", flush=True)
    apply_plan(model, plan)
    layers = model.config.num_hidden_layers
    set_strengths(model, [0.0] * layers, [0.0] * layers)
    for rule in next(iter(gains.values())):
        with torch.no_grad():
            for path in plan.linears:
                gain = model.get_parameter(f"{path}.rms_norm.weight")
                gain.copy_(gains[path][rule].expand_as(gain))
        total, count = nats(model, held, 4)
        print(f"{rule:<32}{total / count:.3f}", flush=True)


if __name__ == "__main__":
    main()
