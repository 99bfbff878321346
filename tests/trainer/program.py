"""What each rank of the tests of Trainer does, and the dense Trainer that they are compared with.

``torchrun --nproc-per-node N -m tests.trainer.program FOLDER DP TP [CHECKPOINT]``; or accelerate launch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from tests.models.peft_truth import adapted
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


def likeliest(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def count(answers: transformers.EvalPrediction) -> dict[str, float]:
    """Numbers that change where a sequence counts twice, or another order is another's."""
    place = np.arange(1, 1 + len(answers.predictions))
    sums = (answers.predictions + answers.label_ids).sum(1)
    return {"rows": len(place), "places": float((sums * place).sum())}


def train(
    kind: type[transformers.Trainer],
    model: nn.Module,
    folder: Path,
    dp: int,
    checkpoint: str | None = None,
) -> list[dict[str, float]]:
    """Train, or go on; leave the model in ``folder``, and return what was logged."""
    trainer = kind(
        model,
        options(folder, dp),
        train_dataset=rows(ROWS, 1),
        eval_dataset=rows(EVALUATED, 2),
        compute_metrics=count,
        preprocess_logits_for_metrics=likeliest,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    metrics = trainer.predict(rows(PREDICTED, 3)).metrics
    log = [line for line in trainer.state.log_history if "train_loss" not in line]
    log.append({"step": STEPS, **{key: metrics[f"test_{key}"] for key in ("rows", "places")}})
    times = ("runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(times)} for line in log]


def main(folder: Path, dp: int, tp: int, checkpoint: str | None) -> None:
    import pyparallel

    torch.set_num_threads(1)
    mesh = pyparallel.init_mesh(dp=dp, tp=tp)
    model = pyparallel.parallelize(model_of(), mesh)
    told = {"log": train(pyparallel.Trainer, model, folder, dp, checkpoint)}
    if checkpoint is None:
        again = pyparallel.parallelize(model_of(), mesh)
        half = str(folder / f"checkpoint-{HALF}")
        told["resumed"] = train(pyparallel.Trainer, again, folder / "resumed", dp, half)
        adapters = pyparallel.parallelize(adapted(ADAPTED), mesh)
        told["adapters"] = train(pyparallel.Trainer, adapters, folder / "adapters", dp)
    if mesh.world.rank == 0:
        (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), (*sys.argv[4:], None)[0])
