"""What is planned: how a model is cut, and the work it is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from pyparallel.checkpoint.schema import shown
from pyparallel.limits import check_count

# Bytes of one number; int4 with the scale of its block of 32 (GGUF's Q4_0), fp4 with that of 16.
BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5625,
    "fp4": 0.5625,
}
# What backward computes again: nothing; all between q, k, v and the output projection; everything but
# the layers' inputs. As `pyparallel train --recompute` names them; also called none, selective, full.
RECOMPUTE = ("none", "attention", "layers")
# Bytes a parameter of an optimizer's moments, in units of their dtype.
OPTIMIZERS = {"adamw": 2, "sgd": 0, "momentum": 1}
_MOST = 1 << 31


@dataclass(frozen=True)
class Strategy:
    """dp x pp x cp x tp ranks, and how each stage works.

    Attributes:
        sp: sequence parallel on the tp axis: norms, dropout and residuals on 1/tp of the tokens.
        micro_batch: sequences of one forward of one dp rank.
        virtual_stages: stages a pp rank holds (interleaved 1F1B where above 1).
        zero: what dp (with cp) ranks share out: 0 nothing, 1 optimizer states, 2 gradients too,
            3 weights too (FSDP).
        recompute: one of :data:`RECOMPUTE`.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    sp: bool = False
    micro_batch: int = 1
    virtual_stages: int = 1
    zero: int = 0
    recompute: str = "none"

    def __post_init__(self) -> None:
        for name in ("dp", "pp", "cp", "tp", "micro_batch", "virtual_stages"):
            check_count(name, getattr(self, name), _MOST)
        check_count("zero", self.zero, 3, least=0)
        check_choice("recompute", self.recompute, RECOMPUTE)

    @property
    def ranks(self) -> int:
        """How many GPUs it takes."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def sequence_shards(self) -> int:
        """Into how many parts the tokens between the matmuls are cut by sp."""
        return self.tp if self.sp else 1

    def __str__(self) -> str:
        cuts = f"dp {self.dp} x pp {self.pp} x cp {self.cp} x tp {self.tp}"
        return cuts + (" + sp" if self.sp else "")


@dataclass(frozen=True)
class Inference:
    """Prompts that are answered together.

    Attributes:
        batch: sequences at once on one dp replica.
        prompt, output: tokens of each, read and written.
        weight_dtype, kv_dtype: names of :data:`BYTES`.
    """

    batch: int = 1
    prompt: int = 1024
    output: int = 128
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output"):
            check_count(name, getattr(self, name), _MOST)
        for name in ("weight_dtype", "kv_dtype"):
            check_choice(name, getattr(self, name), tuple(BYTES))

    @property
    def length(self) -> int:
        """Tokens of a sequence when its answer is done."""
        return self.prompt + self.output


@dataclass(frozen=True)
class Training:
    """One step of an optimizer.

    Attributes:
        global_batch: sequences of a step over all dp ranks.
        sequence: tokens of each.
        dtype: of weights in the matmuls, and of activations.
        gradient_dtype: in which gradients are summed and kept.
        optimizer: one of :data:`OPTIMIZERS`; its moments are fp32.
        master: an fp32 copy of the weights is kept beside those of ``dtype``.
        frozen: only adapters are trained: no gradients or moments of the weights.
    """

    global_batch: int
    sequence: int
    dtype: str = "bf16"
    gradient_dtype: str = "fp32"
    optimizer: str = "adamw"
    master: bool = True
    frozen: bool = False

    def __post_init__(self) -> None:
        check_count("global_batch", self.global_batch, _MOST)
        check_count("sequence", self.sequence, _MOST)
        check_choice("dtype", self.dtype, ("fp32", "bf16", "fp16", "fp8", "fp4"))
        check_choice("gradient_dtype", self.gradient_dtype, ("fp32", "bf16", "fp16"))
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch * self.sequence

    def micro_batches(self, strategy: Strategy) -> int:
        """How many micro-batches each dp rank runs in a step.

        Raises:
            ValueError: the global batch is no multiple of dp x micro_batch.
        """
        together = strategy.dp * strategy.micro_batch
        if self.global_batch % together:
            raise ValueError(
                f"global_batch: expected a multiple of dp {strategy.dp} x micro_batch "
                f"{strategy.micro_batch}, got {self.global_batch}"
            )
        return self.global_batch // together


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
