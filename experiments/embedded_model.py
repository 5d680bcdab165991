"""Train the checkpoint that ships inside the package, from scratch, on the standard library's text.

    python experiments/embedded_model.py --out out/embedded [--epochs 4]

A Llama of 2.8 M parameters and a byte-level BPE of 4,096 entries, both fitted on the training part of `--data stdlib`;
the held-out part (by hash of the module's path) is never seen. Hidden matrices go to Muon, everything else to AdamW;
the learning rate falls to zero, because a base model that still improves by itself would flatter the tuned one.
Two CPU cores, bf16 autocast: half an hour. More epochs memorise: after nine the held-out loss is higher, and continuing
at a high learning rate lowers it by 0.085 nats. docs/LOG.md has the run that made the shipped file.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trilobit.corpus import stdlib_documents

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(tokenizer.eos_token_id)
    return np.array(ids, dtype=np.int64)


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, length: int) -> float:
    count = min(128, (len(tokens) - 1) // length)
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)  # spread: modules differ much in difficulty
    windows = torch.stack([torch.from_numpy(tokens[i : i + length + 1]) for i in starts])
    return sum(loss_of(model, batch).item() * len(batch) for batch in windows.split(8)) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    torch.manual_seed(0)

    train_texts = [text for _, text in stdlib_documents("train")]
    held_out_texts = [text for _, text in stdlib_documents("heldout")]
    tokenizer = train_tokenizer(train_texts, 4096)
    train, held_out = tokenize(tokenizer, train_texts), tokenize(tokenizer, held_out_texts)
    size = sum(len(text.encode()) for text in train_texts)
    print(f"{len(train):,} training tokens ({size / len(train):.2f} bytes each), {len(held_out):,} held out", flush=True)

    config = LlamaConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for p in model.parameters() if not any(p is q for q in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=arguments.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    length, batch = 512, 8
    steps = int(arguments.epochs * len(train) / (length * batch))
    generator = np.random.default_rng(0)
    log = (arguments.out / "log.jsonl").open("w")
    started = time.time()
    for step in range(steps):
        progress = step / steps
        lr = arguments.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        starts = generator.integers(0, len(train) - length - 1, size=batch)
        windows = torch.stack([torch.from_numpy(train[i : i + length + 1]) for i in starts])
        loss = loss_of(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            row = {"step": step, "tokens": (step + 1) * length * batch, "loss": loss.item(), "lr": lr}
            row["heldout_loss"] = held_out_loss(model, held_out, length)
            row["tokens_per_second"] = round(row["tokens"] / (time.time() - started))
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            if step:
                model.save_pretrained(arguments.out / "fp32")
    model.to(torch.bfloat16).save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")


if __name__ == "__main__":
    main()
