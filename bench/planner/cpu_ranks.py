"""The planner's prediction of our own CPU ranks beside what they take, on this machine.

    pytest -s --benchmark-enable bench/planner/cpu_ranks.py

Each number of ranks is calibrated first (`pyparallel plan --calibrate`), on nothing but matmuls, sums
and models without size; then SmolLM2 and two random Llamas read a prompt and answer it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.rivals import MODEL, machine, print_table
from pyparallel.commands.calibrate import calibrate, write
from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.config import from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.load import load
from pyparallel.models.stage import stages_of
from pyparallel.planner.engine_rates import engine_of_file
from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.serving import answer_batch
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Inference, Strategy

ROUNDS = 5
PROMPT, OUTPUT = 512, 32
LLAMA = {
    "model_type": "llama",
    "vocab_size": 16000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Wide and shallow; narrow and deep.
WIDE = LLAMA | {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
DEEP = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 28,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
MODELS = {"SmolLM2-135M": "smollm2-135m", "wide Llama": WIDE, "deep Llama": DEEP}
MESHES = ({"tp": 1}, {"tp": 2}, {"pp": 2})


def measured(sizes: dict[str, int], model: str | dict[str, Any]) -> tuple[float, float]:
    """Seconds of a prompt and of a token, medians."""
    mesh = init_mesh(**sizes)
    if isinstance(model, str):
        decoder = load(MODEL, mesh, dtype=torch.float32)
    else:
        config = from_hugging_face(model)
        stage = stages_of(config, mesh.pp.size)[mesh.pp.rank]
        decoder = Decoder(config, "cpu", torch.float32, group=mesh.tp, stage=stage).eval()
        decoder.pipeline = mesh.pp
        torch.manual_seed(0)
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(decoder.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0))
    made = [
        generate(decoder, [ids.tolist()], max_new_tokens=OUTPUT, stop_ids=())
        for _ in range(ROUNDS + 1)
    ][1:]
    return (
        statistics.median(one.prefill_s for one in made),
        statistics.median(one.decode_s / one.steps for one in made),
    )


def predicted(device: Path, sizes: dict[str, int], model: str | dict) -> tuple[float, float]:
    """The planner's."""
    shape, strategy = model_shape(model), Strategy(**sizes)
    work = Inference(1, PROMPT, OUTPUT, "fp32", "fp32")
    cluster = cluster_of(device, strategy.ranks)
    speed = answer_batch(shape, cluster, strategy, work, engine_of_file(device))
    return speed.ttft_s, speed.tpot_s


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The calibrated device by the number of ranks."""
    found = {}
    for ranks in (1, 2):
        found[ranks] = tmp_path_factory.mktemp("devices") / f"cpu{ranks}.toml"
        write(calibrate(ranks), found[ranks])
    return found


def test_prediction(benchmark: Any, devices: dict[int, Path]) -> None:
    rows, errors = [], []
    for name, model in MODELS.items():
        for sizes in MESHES:
            ranks = Strategy(**sizes).ranks
            truth = launch(measured, ranks, sizes, model)[0]
            told = predicted(devices[ranks], sizes, model)
            cells = [name, " ".join(f"{axis} {size}" for axis, size in sizes.items())]
            for guess, seconds in zip(told, truth, strict=True):
                errors.append(abs(guess / seconds - 1))
                cells += [
                    f"{1e3 * guess:.2f}",
                    f"{1e3 * seconds:.2f}",
                    f"{guess / seconds - 1:+.0%}",
                ]
            rows.append(cells)
    columns = ("model", "mesh", "prefill, predicted ms", "measured", "", "token, predicted ms")
    print_table("planner on CPU ranks", (*columns, "measured", ""), rows)
    errors.sort()
    print(f"error: median {statistics.median(errors):.1%}, worst {errors[-1]:.1%}")
    work = (devices[2], {"tp": 2}, WIDE)
    benchmark(lambda: predicted(*work))
    benchmark.extra_info |= machine() | {"op": "plan", "rows": json.dumps(rows), "errors": errors}
