"""The parallel modules: parameters and one call each."""

from pyparallel.layers import fsdp_replicas, optimizers, replicas, total_norm  # noqa: F401
from pyparallel.layers.column_parallel_linear import ColumnParallelLinear
from pyparallel.layers.norm import LayerNorm, RMSNorm
from pyparallel.layers.parallel_attention import ParallelAttention
from pyparallel.layers.parallel_lm_head import ParallelLMHead
from pyparallel.layers.parallel_mlp import ParallelMLP
from pyparallel.layers.qkv_parallel_linear import QKVParallelLinear
from pyparallel.layers.rotary_embedding import RotaryEmbedding
from pyparallel.layers.row_parallel_linear import RowParallelLinear
from pyparallel.layers.sequence_parallel_dropout import SequenceParallelDropout
from pyparallel.layers.sequence_parallel_layer_norm import SequenceParallelLayerNorm
from pyparallel.layers.sequence_parallel_rms_norm import SequenceParallelRMSNorm
from pyparallel.layers.vocab_parallel_embedding import VocabParallelEmbedding

__all__ = [
    "ColumnParallelLinear",
    "LayerNorm",
    "ParallelAttention",
    "ParallelLMHead",
    "ParallelMLP",
    "QKVParallelLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SequenceParallelDropout",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "VocabParallelEmbedding",
]
