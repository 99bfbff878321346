"""The data and the arguments of the tests of Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from tests.transformers_models import build

# Sequences a step, over all ranks; the model of the config sees as many, whatever the mesh.
BATCH, ACCUMULATION, STEPS, HALF = 4, 2, 6, 3
ROWS, LENGTH = 52, 9
# Losses of evaluation are means over whole batches; what is predicted divides by nothing.
EVALUATED, PREDICTED = 8, 7
# With LoRA, in fp64, and without dropout, which dp replicas draw by themselves.
ADAPTED = "qwen2"


def model_of() -> nn.Module:
    """Uneven over 2 ranks; tied, and with biases."""
    return build("llama tied")


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences with other numbers of targets each, so that a mean of means is another number."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(count):
        ids = torch.randint(2, 60, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, LENGTH - 2, (), generator=generator))] = -100
        data.append({"input_ids": ids, "labels": labels})
    return data


def options(folder: Path, dp: int) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH // dp,
        per_device_eval_batch_size=BATCH // dp,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=HALF,
        save_steps=HALF,
        load_best_model_at_end=True,
        include_num_input_tokens_seen="all",
        seed=7,
        report_to="none",
        disable_tqdm=True,
    )
