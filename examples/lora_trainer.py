"""LoRA on a model that four ranks share, dp 2 x tp 2, by transformers' Trainer.

    torchrun --nproc-per-node 4 examples/lora_trainer.py --model DIR --out adapter
    python examples/lora_trainer.py --model DIR --out adapter     # four CPU ranks of this machine

The adapter that is written is peft's own: it loads on the dense model, and on any other mesh.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft
import torch
import transformers

import pyparallel


def rows_of(folder: str, length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Python's own argparse as rows of tokens, which are their own targets."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(argparse.__file__).read_text())["input_ids"]
    starts = range(0, len(ids) - length, length)
    cut = [torch.tensor(ids[start : start + length]) for start in starts]
    return [{"input_ids": row, "labels": row} for row in cut]


def train(folder: str, out: str, steps: int) -> list[float]:
    """What every rank runs; the losses."""
    mesh = pyparallel.init_mesh(dp=2, tp=2)
    model = pyparallel.load(folder, mesh, transformers=True)
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = pyparallel.Trainer(
        peft.get_peft_model(model, config),
        transformers.TrainingArguments(
            out,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows_of(folder),
    )
    trainer.train()
    trainer.save_model(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--out", required=True, help="where the adapter is written")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    losses = pyparallel.launch(train, 4, args.model, args.out, args.steps)[0]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the adapter is in {args.out}")
