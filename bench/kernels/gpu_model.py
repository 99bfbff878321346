"""A whole Llama on one GPU: transformers' dense model, and the same after parallelize() at tp = 1.

    python -m bench.kernels.gpu_model [--layers 16] [--json FILE]

Random weights in the shape of Llama-3.2-1B, bf16. The two take turns; a time is the median turn's, by
CUDA events, for reading a prompt, a training step (forward and backward) and 64 tokens of generate().
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import nn

from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize

TURNS = 5
PROMPT, TRAINED, NEW_TOKENS = (1, 4096), (2, 2048), 64
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def build(layers: int, device: str) -> nn.Module:
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).bfloat16().eval()


def work(model: nn.Module, device: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randint(SHAPE["vocab_size"], s, generator=generator) for s in (PROMPT, TRAINED)]
    prompt, trained = (ids.to(device) for ids in draw)
    start = prompt[:, :128]

    def read() -> None:
        with torch.no_grad():
            model(prompt, logits_to_keep=1)

    def train() -> None:
        model(trained, labels=trained, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def decode() -> torch.Tensor:
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        how |= {"pad_token_id": 0, "attention_mask": torch.ones_like(start)}
        with torch.no_grad():
            return model.generate(start, **how)

    return {"prompt of 4096": read, "training step 2x2048": train, "64 tokens": decode}


def seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    mesh = init_mesh(tp=1)
    models = {
        "transformers": build(args.layers, "cuda"),
        "pyparallel tp=1": parallelize(build(args.layers, "cuda"), mesh),
    }
    calls = {name: work(model, "cuda") for name, model in models.items()}
    facts = [torch.cuda.get_device_name(), f"torch {torch.__version__}"]
    print("command:", "python -m bench.kernels.gpu_model", *sys.argv[1:])
    print(", ".join([*facts, f"transformers {transformers.__version__}", f"{args.layers} layers"]))
    found: dict[str, dict[str, list[float]]] = {}
    for what in calls["transformers"]:
        taken: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(TURNS + 1):
            for name in models:
                time = seconds(calls[name][what])
                if turn:
                    taken[name].append(time)
        found[what] = taken
        dense, ours = (median(taken[name]) for name in models)
        print(f"{what:22} {dense * 1e3:9.2f} ms  {ours * 1e3:9.2f} ms  {dense / ours:5.2f} x")
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
