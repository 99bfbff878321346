"""The decoders that decode.py and prefill.py of bench/decoding compare, each as ``make(...) -> turn``.

A turn takes ("decode", steps) and gives the tokens; ("prefill", length) and gives the first token;
("context", position) and gives the token of eight steps at that position, ("fill",) being before it;
("memory",).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from bench.rivals import MODEL, memory
from pyparallel import backend
from pyparallel.decoding.cpu_decoder import CPUDecoder
from pyparallel.mesh import init_mesh
from pyparallel.models.config import DecoderConfig
from pyparallel.models.dense import load_dense
from pyparallel.models.load import load

PROMPT = [504, 3575, 282, 4649, 314]
LONGEST = 8192

# An even-headed Llama of 125M parameters, which transformers' tp_plan can cut in two.
EVEN = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def long_prompt(length: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def ours(
    model: str,
    dtype: str,
    quantized: str | None = None,
    layers: int | None = None,
    shares: tuple[int, ...] | None = None,
) -> Callable[[tuple], Any]:
    """pyparallel's decoder in C++ on the ranks it is launched on, or its first ``layers``."""
    mesh = init_mesh(tp=torch.distributed.get_world_size(), shares=shares)
    kind = getattr(torch, dtype)
    path = _even_folder() if model == "even" else MODEL
    decoder_model = load(path, mesh, dtype=kind, weights=quantized)
    if layers is not None:
        decoder_model.layers = torch.nn.ModuleList(decoder_model.layers[:layers])
    decoder = CPUDecoder(decoder_model)
    vocab_size = decoder_model.vocab_size
    sizes = [p.numel() * p.itemsize for p in decoder_model.parameters()]
    slots = min(LONGEST, decoder_model.max_positions)
    decoder.start(1, slots)
    cache = sum(c.keys.numel() * c.keys.itemsize * 2 for c in decoder.cache)

    def turn(request: tuple) -> Any:
        kind, *rest = request
        if kind == "decode":
            decoder.prefill(PROMPT)
            tokens = decoder.greedy()
            for step in range(rest[0]):
                decoder.decode(tokens[-1:], rows=[0], positions=[len(PROMPT) + step])
                tokens += decoder.greedy()
            return tokens
        if kind == "prefill":
            decoder.prefill(long_prompt(rest[0], vocab_size))
            return decoder.greedy()
        if kind == "fill":
            # Slots never written are one page of zeros, which is read from a cache.
            for layer in decoder.cache:
                layer.keys.normal_()
                layer.values.normal_()
            return None
        if kind == "context":
            for _ in range(8):
                decoder.decode([7], rows=[0], positions=[rest[0]])
            return decoder.greedy()
        held = {"weight_bytes": sum(sizes), "cache_bytes": cache, "largest_bytes": max(sizes)}
        return held | memory()

    return turn


def modules(model: str, dtype: str) -> Callable[[tuple], Any]:
    """pyparallel's modules, a Python call a layer: what the decoder in C++ is a faster twin of."""
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    decoder = load(MODEL, mesh, dtype=getattr(torch, dtype))

    @torch.inference_mode()
    def turn(request: tuple) -> Any:
        kind, *rest = request
        ids = PROMPT if kind == "decode" else long_prompt(rest[0], decoder.vocab_size)
        steps = rest[0] if kind == "decode" else 0
        cache = decoder.new_cache(1, len(ids) + steps)
        with backend.use("torch"):
            hidden = decoder.hidden(torch.tensor([ids]), [0], cache)[:, -1]
            tokens = decoder.head.greedy(hidden).tolist()
            for step in range(steps):
                step_ids = torch.tensor([tokens[-1:]])
                hidden = decoder.hidden(step_ids, [len(ids) + step], cache)[:, -1]
                tokens += decoder.head.greedy(hidden).tolist()
        return tokens

    return turn


def hugging_face(model: str, dtype: str, tp_plan: bool = False) -> Callable[[tuple], Any]:
    """transformers, dense or by its own tensor-parallel plan, in its quickest plain loop."""
    from transformers import AutoModelForCausalLM, DynamicCache

    kind = getattr(torch, dtype)
    if tp_plan:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        dense = AutoModelForCausalLM.from_pretrained(_even_folder(), dtype=kind, tp_plan="auto")
    elif model == "even":
        dense = AutoModelForCausalLM.from_pretrained(_even_folder(), dtype=kind)
    else:
        dense = load_dense(str(MODEL), kind)
    dense.eval()

    @torch.inference_mode()
    def turn(request: tuple) -> Any:
        kind, *rest = request
        if kind == "memory":
            return memory()
        ids = PROMPT if kind == "decode" else long_prompt(rest[0], dense.config.vocab_size)
        cache = DynamicCache(config=dense.config)
        logits = dense(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits
        tokens = logits[0, -1:].argmax(-1).tolist()
        for _ in range(rest[0] if kind == "decode" else 0):
            logits = dense(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
            tokens += logits[0, -1:].argmax(-1).tolist()
        return tokens

    return turn


def _even_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**EVEN, tie_word_embeddings=False)


def _even_folder() -> str:
    """The even-headed model as a checkpoint, made once: tp_plan reads nothing else."""
    import tempfile

    from transformers import LlamaForCausalLM

    folder = os.path.join(tempfile.gettempdir(), f"pyparallel-even-llama-{os.getuid()}")
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        torch.manual_seed(0)
        LlamaForCausalLM(_even_config()).save_pretrained(folder)
    return folder


def weight_bytes_read(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of weights that one decoded token has to read: every matrix once, one embedding row."""
    c = asdict(config)
    q, kv = c["num_heads"] * c["head_dim"], c["num_kv_heads"] * c["head_dim"]
    layer = c["hidden_size"] * (2 * q + 2 * kv + 3 * c["intermediate_size"])
    return (c["num_layers"] * layer + c["vocab_size"] * c["hidden_size"]) * dtype.itemsize
