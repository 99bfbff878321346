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
from tests.trainer.settings import (
    ADAPTED,
    EVALUATED,
    HALF,
    PREDICTED,
    ROWS,
    STEPS,
    model_of,
    options,
    rows,
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
        # Only here: accelerate alone is asked too.
        from tests.trainer.refusals import refused

        told["refused"] = refused(folder / "refused", mesh)
        told["adapters"] = train(pyparallel.Trainer, adapters, folder / "adapters", dp)
    if mesh.world.rank == 0:
        (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), (*sys.argv[4:], None)[0])
