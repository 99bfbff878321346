"""Measures this machine's CPU ranks as the planner wants them: rates, links, and what a layer costs.

    memory rate     a vector times matrices that no cache holds, on all ranks at once
    matmul rate     a prompt of 512 tokens through four wide layers, likewise
    layer_s         decode steps of models too small to read or compute anything: the slope over layers;
                    staged_layer_s where they lie on the ranks as stages
    step_s          what is left of a step without layers
    sequence_s      of each sequence more in such a step
    alpha           what a layer's two sums over the ranks add to layer_s, for each
    link            bytes a second of an all-reduce of 4 MiB

Nothing of the models that are planned later is measured; their times are predictions.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pyparallel.comm.group import Group
from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.config import from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import stages_of
from pyparallel.native.cpu.ops import linear
from pyparallel.planner.communication import LINK_FRACTION

ROUNDS = 5
# Of weights read in turn: four times what the largest third-level caches keep for two cores.
READ_BYTES = 256 << 20
LARGE = 4 << 20
PROMPT = [5, 6, 7]
STEPS = 48


@dataclass(frozen=True)
class Calibration:
    """One rank of ``ranks`` that share the machine, all at work.

    Attributes:
        bandwidth: bytes a second that a matmul of one row reads.
        fp32_flops, bf16_flops: of matmuls of many rows.
        layer_s, step_s, sequence_s: of a decode step beside its bytes; staged_layer_s: a layer of a
            model that is cut over stages.
        alpha_s, bytes_per_s: of the link between ranks, as ``planner.communication`` counts them.
    """

    ranks: int
    threads: int
    memory_bytes: int
    bandwidth: float
    fp32_flops: float
    bf16_flops: float
    layer_s: float
    step_s: float
    sequence_s: float
    staged_layer_s: float
    alpha_s: float
    bytes_per_s: float


def calibrate(ranks: int) -> Calibration:
    """Measures ``ranks`` ranks of this machine; takes some ten seconds.

    Raises:
        ValueError: more ranks than a launch takes.
    """
    return launch(_measure, ranks, ranks)[0]


def write(found: Calibration, path: Path) -> None:
    """A TOML file that ``--gpu`` takes: a device that is one rank, and the link between ranks."""
    model = platform.processor() or platform.machine()
    path.write_text(
        f"# {found.ranks} ranks of {found.threads} threads, measured {time.strftime('%Y-%m-%d')}.\n"
        f'[gpu]\nname = "CPU rank"\narch = "{model}"\n'
        f"memory_bytes = {found.memory_bytes}\n"
        f"bandwidth = {found.bandwidth:.4g}\n"
        f"bf16_flops = {found.bf16_flops:.4g}\nmeasured_bf16_flops = {found.bf16_flops:.4g}\n"
        f"fp32_flops = {found.fp32_flops:.4g}\n"
        f"gpus_per_node = {found.ranks}\n\n"
        f'[intra]\nname = "shared memory"\nalpha_s = {found.alpha_s:.4g}\n'
        f"bytes_per_s = {found.bytes_per_s:.4g}\n\n"
        f"[engine]\nlayer_s = {found.layer_s:.4g}\nstep_s = {found.step_s:.4g}\n"
        f"sequence_s = {found.sequence_s:.4g}\nstaged_layer_s = {found.staged_layer_s:.4g}\n",
        encoding="utf-8",
    )


def _measure(ranks: int) -> Calibration:
    mesh, alone = init_mesh(tp=ranks, device_type="cpu"), Group.single()
    few, many = (_step_s(layers, alone) for layers in (2, 12))
    # On a machine that does other work as well, differences may come out below nothing.
    layer_s = max(0.0, (many - few) / 10)
    step_s = max(0.0, few - 2 * layer_s)
    cut_few, cut_many = (_step_s(layers, mesh.tp) for layers in (2, 12))
    # Two sums a layer, each of 0.4 (R + 2) alpha.
    sums = max(0.0, (cut_many - cut_few) / 10 - layer_s)
    alpha_s = sums / 2 / (0.4 * (ranks + 2)) if ranks > 1 else 0.0
    sequence_s = max(0.0, (_step_s(2, alone, batch=8) - few) / 7)
    staged_layer_s = layer_s
    if ranks > 1:
        stages = init_mesh(pp=ranks, device_type="cpu").pp
        many, few = (_step_s(n * ranks, alone, stages=stages) for n in (6, 1))
        staged_layer_s = max(0.0, (many - few) / (5 * ranks))
    return Calibration(
        ranks=ranks,
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks,
        bandwidth=_read_rate(mesh.tp),
        fp32_flops=_matmul_rate(torch.float32, mesh.tp),
        bf16_flops=_matmul_rate(torch.bfloat16, mesh.tp),
        layer_s=layer_s,
        step_s=step_s,
        sequence_s=sequence_s,
        staged_layer_s=staged_layer_s,
        alpha_s=alpha_s,
        bytes_per_s=_link_rate(mesh.tp) if ranks > 1 else 1.0,
    )


def _seconds(run: Callable[[], object], group: Group) -> float:
    """The median of a few rounds that all ranks begin together; the slowest rank's."""
    run()
    found = []
    for _ in range(ROUNDS):
        group.communicator.barrier()
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(found), dtype=torch.float64)
    group.communicator.all_reduce(slowest, op="max")
    return float(slowest)


@torch.inference_mode()
def _read_rate(group: Group) -> float:
    weights = [torch.randn(4096, 1024) for _ in range(READ_BYTES >> 24)]
    x = torch.randn(1, 1024)
    return READ_BYTES / _seconds(lambda: [linear(x, weight) for weight in weights], group)


def _matmul_rate(dtype: torch.dtype, group: Group) -> float:
    """FLOPs a second of reading a prompt, attention's included."""
    layers, tokens = 4, 512
    model = _model(layers, Group.single(), dtype, hidden=1024, heads=16)
    prompt = [number % 128 for number in range(tokens)]
    seconds = _seconds(lambda: generate(model, [prompt], max_new_tokens=1, stop_ids=()), group)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    return (2 * weights * tokens + layers * 2 * tokens**2 * 1024) / seconds


def _link_rate(group: Group) -> float:
    buffer = torch.zeros(LARGE // 4)
    seconds = _seconds(lambda: group.communicator.all_reduce(buffer), group)
    wire = 2 * (group.size - 1) / group.size * LARGE
    return wire / seconds / LINK_FRACTION


def _step_s(layers: int, group: Group, *, batch: int = 1, stages: Group | None = None) -> float:
    """Seconds of a decode step of a model that has next to nothing to read."""
    model = _model(layers, group, torch.float32, hidden=64, heads=2 * group.size, stages=stages)
    made = [
        generate(model, [PROMPT] * batch, max_new_tokens=STEPS, stop_ids=())
        for _ in range(ROUNDS + 1)
    ]
    return statistics.median(one.decode_s / one.steps for one in made[1:])


def _model(
    layers: int,
    group: Group,
    dtype: torch.dtype,
    *,
    hidden: int,
    heads: int,
    stages: Group | None = None,
) -> Decoder:
    """A Llama of these sizes; over ``stages`` this rank's part."""
    config = from_hugging_face(
        {
            "model_type": "llama",
            "vocab_size": 128,
            "hidden_size": hidden,
            "intermediate_size": 11 * hidden // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": max(32, hidden // heads),
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }
    )
    stages = stages or Group.single()
    stage = stages_of(config, stages.size)[stages.rank]
    model = Decoder(config, "cpu", dtype, group=group, stage=stage).eval()
    model.pipeline = stages
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    return model
