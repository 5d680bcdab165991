"""What a step of each arm costs: tokens per second of the proof study's arms, interleaved, on an idle machine.

    python experiments/proof_steps.py STUDY MODEL --data TEXT [--arms …] [--rounds 3] [--steps 250]

Every round tunes each arm for so many steps, compiled as the study's longer trials are, and takes the median rate of the
log. The rounds go to docs/data/proof/STUDY-steps.json; proof_report.py compares arms at equal time with them.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from proof import RECORDS, STUDIES, Quiet
from proof_arms import ARMS

from trilobit.config.tune import TuneConfig
from trilobit.train import tune
from trilobit.train.plots import read_log

COMPARED = (
    "every-global-kl", "none-global-kl", "none-immediate-kl", "recipe-hf-blog", "every-ones-immediate-ce",
    "every-ones-layerwise-ce", "none-immediate-ce", "recipe-bitdistill-normalised",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(COMPARED))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/proof"))
    parser.add_argument("--records", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    settings = STUDIES[arguments.study].settings
    rates: dict[str, list[float]] = {arm: [] for arm in arguments.arms}
    for _ in range(arguments.rounds):
        for arm in arguments.arms:
            out = arguments.out / "steps" / arm
            shutil.rmtree(out, ignore_errors=True)
            own = {**settings, **ARMS[arm], "compile": "yes"}
            if "distill_attention" in own:
                own["attention"] = "sdpa"  # the one that can be listened to
            if arguments.data != "self":
                own.pop("self_tokens", None)
            own |= {"max_tokens": arguments.steps * own["batch_tokens"], "eval_every": 1 << 40, "lr": 1e-3}
            own |= {"cache_dir": str(arguments.out / "tokens"), "device": arguments.device, "model_format": "none"}
            tune.run(TuneConfig(**own, model=arguments.model, data=arguments.data, out=str(out)), Quiet())
            rates[arm].append(float(np.median([row["tokens_per_second"] for row in read_log(out)])))
            shutil.rmtree(out, ignore_errors=True)
            print(f"{arm:<32}{rates[arm][-1]:>10,.0f} tokens/s", flush=True)
    path = arguments.records / f"{arguments.study}-steps.json"
    path.write_text(json.dumps({arm: [round(rate) for rate in values] for arm, values in rates.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
