"""Loading whole models of many tensors, beside transformers: Llamas of many small layers.

    make bench-whole_models

One rank of one thread. Rivals take turns in one process; the files are in the page cache. A line for
each number of tensors: medians of wall and CPU seconds, and the ratios of the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load

# Of a layer of transformers' Llama.
TENSORS = 9
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write(folder: Path, layers: int) -> None:
    """A Llama of random weights, as transformers saves it."""
    config = transformers.LlamaConfig(num_hidden_layers=layers, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def timed(folder: str, small: str, repeats: int) -> dict[str, Any]:
    """Medians of all, in turns.

    Args:
        small: a model that each reads first, with all that it imports.
    """
    mesh = init_mesh(tp=1)
    rivals: dict[str, Callable[[str], torch.nn.Module]] = {
        "pyparallel": lambda path: load(path, mesh),
        "pyparallel, transformers' class": lambda path: load(path, mesh, transformers=True),
        "transformers": transformers.AutoModelForCausalLM.from_pretrained,
    }
    for read in rivals.values():
        read(small)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, read in rivals.items():
            begin = time.perf_counter(), time.process_time()
            model = read(folder)
            times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
            # Its end is not its beginning.
            del model
    return {
        name: {
            "wall_s": round(statistics.median(wall for wall, _ in found), 3),
            "cpu_s": round(statistics.median(cpu for _, cpu in found), 3),
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, nargs="+", default=[5000, 50_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for number in options.tensors:
        with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as small:
            write(Path(name), number // TENSORS)
            write(Path(small), 1)
            (found,) = launch(timed, 1, name, small, options.repeats, threads=1)
            truth = found["transformers"]["wall_s"]
            ratios = {name: round(times["wall_s"] / truth, 2) for name, times in found.items()}
            print(json.dumps({"tensors": number, **found, "ratios": ratios}), flush=True)


if __name__ == "__main__":
    main()
