"""What training at scale takes, as the cost model of src/trilobit/train/plan.py counts it: the tables of docs/scale.md.

    python experiments/scale_plan.py [--sequence-length 4096]

Nothing is measured here: rates are those of `Rates`, an H100 in machines of eight with a 400 Gb/s card each.
"""

import argparse

from trilobit.train.plan import Load, Plan, plan
from trilobit.train.shape import read_shape

MODELS = ("llama-1.4b", "llama-8b", "llama-70b")
GPUS = (1, 8, 64, 512, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence-length", type=int, default=4096)
    length = parser.parse_args().sequence_length
    shapes = {model: read_shape(model, length) for model in MODELS}
    load = Load(length, optimizer="muon", recompute=True, teacher=False)
    print("| model | GPUs | mesh | GB a rank | compute, s | network, s | Muon, s | tokens/s at most |")
    print("|---|---|---|---|---|---|---|---|")
    for model, shape in shapes.items():
        for gpus in GPUS:
            print(row(plan(model, shape, gpus, load)))
    print("\n| llama-1.4b on 64 GPUs | GB a rank | compute, s | network, s | Muon, s | tokens/s at most |")
    print("|---|---|---|---|---|---|")
    for mesh in ("ddp", "fsdp", "hsdp:8x8"):
        found = plan("llama-1.4b", shapes["llama-1.4b"], 64, load, mesh=mesh)
        print("| " + " | ".join([mesh, *numbers(found)]) + " |")
    print("\n| llama-8b, GB on one rank | 1 GPU | 2 | 4 | 8 |")
    print("|---|---|---|---|---|")
    kinds = {
        "AdamW": Load(length, optimizer="adamw", recompute=False, teacher=False),
        "AdamW, activations recomputed": Load(length, optimizer="adamw", teacher=False),
        "the same, moments in the host's memory": Load(length, optimizer="adamw", teacher=False, offload=True),
        "Muon, activations recomputed": load,
        "the same, momentum in int8, other moments in bf16": Load(length, teacher=False, state="int8"),
        "the same, gradients in bf16 as well": Load(length, teacher=False, state="int8", gradients="bf16"),
        "Muon and two micro-batches a step, all in fp32": Load(length, accumulation=2, teacher=False),
        "Muon and a teacher, one micro-batch, all in fp32": Load(length, teacher=True),
    }
    for name, each in kinds.items():
        held = []
        for n in (1, 2, 4, 8):
            if n == 1 or each.gradients == "fp32":
                needed = plan("llama-8b", shapes["llama-8b"], n, each, mesh="auto" if n == 1 else "fsdp").needed
                held.append(f"{needed / 1e9:.0f}")
            else:
                held.append("–")
        print("| " + " | ".join([name, *held]) + " |")


def row(found: Plan) -> str:
    arrangement = found.arrangement
    mesh = f"hsdp:{arrangement.replicas}x{arrangement.shards}" if arrangement.kind == "hsdp" else arrangement.kind
    return "| " + " | ".join([found.model, f"{found.gpus:,}", mesh, *numbers(found)]) + " |"


def numbers(found: Plan) -> list[str]:
    memory = f"{found.needed / 1e9:.0f}" + ("" if found.fits else ": does not fit")
    speed = f"{round(found.tokens_per_second, -3):,.0f}" if found.fits else "–"
    return [memory, *(f"{found.seconds[name]:.3f}" for name in ("compute", "network", "muon")), speed]


if __name__ == "__main__":
    main()
