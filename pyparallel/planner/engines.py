"""Programs that run models, as far as their memory differs: what each keeps beside what it must."""

from __future__ import annotations

from dataclasses import dataclass

from pyparallel.planner.names import find, shipped


@dataclass(frozen=True)
class Engine:
    """One program's habits. Per token and layer where nothing else is said; a: bytes of an activation.

    Attributes:
        balance: how layers are spread over stages, as :func:`pyparallel.planner.weights.stage_layers`;
            "threshold": a stage ends with the layer that reaches its share of the cost (nanotron).
        fp32_norms: an RMS norm keeps its input and its output in fp32, not its input as it is.
        silu_kept: a gated MLP keeps silu(gate) beside gate, up and their product.
        fused_qkv_kept: q and k before the rotation are kept beside the rotated ones, as v is a part of
            the same memory.
        attention_copies: more copies of attention's output, in units of a N D.
        gathered_kept: "never"; "always": with sp, the inputs of column layers are kept gathered, not
            as shards; "without pipeline": so where pp is 1.
        logit_bytes: a logit's bytes beside those of its own dtype: fp32 copies, a gradient apart.
        table_gradients: gradients of the embedding and the head, in units of a V H, held at the peak.
        workspace_bytes: what libraries have from the framework's allocator.
        context_bytes: a process's own outside of that allocator: the CUDA context, libraries.
        group_bytes: buffers of the communication of each axis with more than one rank.
        fragmentation: the share of activations that the allocator loses.
        state_slack: the share of weights, gradients and optimizer states that it loses.
        tensor_hidden: with sp, tp's messages run under products.
        attention_share: what its attention reaches of what a GPU's calibrated one does.
        flash: attention's scores are never written to memory.
        window_cached: layers with a window cache no more than that.
    """

    name: str
    balance: str = "compute"
    fp32_norms: bool = False
    silu_kept: bool = False
    fused_qkv_kept: bool = False
    attention_copies: float = 0.0
    gathered_kept: str = "never"
    logit_bytes: float = 0.0
    table_gradients: float = 0.0
    workspace_bytes: float = 0.0
    context_bytes: float = 0.0
    group_bytes: float = 0.0
    fragmentation: float = 0.0
    state_slack: float = 0.0
    tensor_hidden: bool = True
    attention_share: float = 1.0
    flash: bool = True
    window_cached: bool = False


def engine_of(name: str) -> Engine:
    """A program by name: "pyparallel", "nanotron", "megatron", "vllm", ...

    Raises:
        ValueError: no such name.
    """
    known = shipped("fits/memory")
    found = find("engine", name, known)
    return Engine(found, **{key: value for key, value in known[found].items() if key != "source"})


PYPARALLEL = engine_of("pyparallel")
