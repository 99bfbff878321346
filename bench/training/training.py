"""Fine-tuning on every kind of mesh against transformers' dense model: the curves must be one.

    python -m bench.training.training [--meshes all] [--out docs/training.png]

The dense model is trained in fp32 and in fp64: how far those two drift apart is what rounding does, and
what a mesh may do a few times over.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.rivals import MODEL, print_table
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.commands.corpus import token_rows
from pyparallel.commands.train import Run, batch_of, train
from pyparallel.launch import launch
from pyparallel.mesh import AXES
from pyparallel.models.dense import load_dense, load_tokenizer

BATCH, LENGTH, ROWS, LR, MAX_NORM = 4, 64, 40, 5e-5, 1.0
# A curve may be this many times as far from the dense fp64 one as the dense fp32 one is: its sums are
# cut over ranks, and its attention and norms are other kernels.
DRIFT = 10
MESHES: dict[str, dict[str, Any]] = {
    "2x2x2": {"dp": 2, "pp": 2, "tp": 2, "micro_batches": 2},
    "dp x tp": {"dp": 2, "tp": 2},
    "dp x tp, fsdp": {"dp": 2, "tp": 2, "engine": "fsdp"},
    "tp + sp": {"tp": 2, "sequence_parallel": True},
    "cp": {"cp": 2},
    "pp": {"pp": 2, "micro_batches": 4},
    "tp = 3": {"tp": 3},
}


def dense_losses(rows: Tensor, steps: int, dtype: str) -> tuple[list[float], float]:
    """The losses of transformers' model, and seconds a step."""
    model = load_dense(str(MODEL), torch.float32).to(getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    started = time.perf_counter()
    losses = []
    for step in range(steps):
        batch = batch_of(rows, step, BATCH)
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, (time.perf_counter() - started) / steps


def run_of(options: dict[str, Any], steps: int) -> Run:
    """The run of one entry of MESHES."""
    sizes = {axis: options.get(axis, 1) for axis in AXES}
    rest = {key: value for key, value in options.items() if key not in AXES}
    return Run(sizes, steps, BATCH, LR, max_norm=MAX_NORM, **rest)


def drift(losses: list[float], truth: list[float]) -> float:
    """The largest distance of two curves."""
    return max(abs(a - b) for a, b in zip(losses, truth, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", default="2x2x2", help="names, by semicolons, or all")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("docs/training.png"))
    args = parser.parse_args()
    names = list(MESHES) if args.meshes == "all" else args.meshes.split(";")
    if unknown := [name for name in names if name not in MESHES]:
        parser.error(f"--meshes: expected some of {'; '.join(MESHES)}, got {unknown[0]!r}")
    library = Path(sysconfig.get_paths()["stdlib"])
    rows = token_rows(load_tokenizer(str(MODEL)), library, ROWS, LENGTH + 1)
    truth, _ = launch(dense_losses, 1, rows, args.steps, "float64")[0]
    single, seconds = launch(dense_losses, 1, rows, args.steps, "float32")[0]
    rounding = drift(single, truth)
    curves = {"dense, fp64": truth, "dense": single}
    table = [["dense", f"{single[-1]:.4f}", f"{rounding:.1e}", f"{seconds:.2f}", ""]]
    checkpoint = open_checkpoint(MODEL)
    apart = []
    for name in names:
        told = train(checkpoint, run_of(MESHES[name], args.steps), rows)
        curves[name] = told["losses"]
        far = drift(told["losses"], truth)
        apart += [name] if far > DRIFT * rounding else []
        held = max(rank["weight_bytes"] for rank in told["ranks"])
        cells = [f"{told['losses'][-1]:.4f}", f"{far:.1e}", f"{told['seconds_per_step']:.2f}"]
        table.append([name, *cells, f"{held / 1e6:.0f}"])
        print(f"{name}: {far:.1e} from dense fp64", flush=True)
    columns = ["mesh", "last loss", "from dense fp64", "s/step", "MB of weights a rank"]
    print_table(f"{args.steps} steps of AdamW, {BATCH} x {LENGTH} tokens", columns, table)
    _plot(curves, truth, args.out)
    if apart:
        print(f"further from dense fp64 than {DRIFT} x {rounding:.1e}: {', '.join(apart)}")
    return 1 if apart else 0


def _plot(curves: dict[str, list[float]], truth: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7))
    for number, (name, losses) in enumerate(curves.items()):
        # Curves that lie on one another are seen by their dashes.
        color = f"C{number}"
        above.plot(losses, label=name, color=color, linewidth=1.2 if number else 5, alpha=0.8)
        if number:
            far = [max(abs(a - b), 1e-9) for a, b in zip(losses, truth, strict=True)]
            below.semilogy(far, label=name, color=color, linewidth=1.2)
    above.set_ylabel("loss")
    above.legend()
    below.set_ylabel("distance from dense fp64")
    below.set_xlabel("step")
    figure.suptitle("SmolLM2-135M fine-tuned on Python's standard library, fp32")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
