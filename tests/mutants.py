"""The numerics of modules, models and training broken on purpose: the bounds must notice.

    python -m tests.mutants [FILE ...]     all, or those of files named so

Each of the tests whose bound is derived (tests/bounds.py) or measured over orders (tests/orders.py)
meets a term that is dropped or counted twice, and a rounding to bf16 where fp32 is promised.
"""

from __future__ import annotations

import sys

from tests.mutation import Mutant, run_mutants

ATTENTION = "pyparallel/ops/attention_with_lse.py"
WITH_LSE = "tests/ops/test_attention_with_lse.py -k forward_and_backward"
ROW = "pyparallel/ops/row_parallel_linear.py"
LAYER_NORM = "pyparallel/ops/layer_norm.py"
RMS_NORM = "pyparallel/ops/rms_norm.py"
ATTENTION_BACKWARD = "pyparallel/ops/attention_with_lse_backward.py"
MERGE = "pyparallel/ops/context/merge_attention.py"
ENGINE = "pyparallel/decoding/cpu_decoder.py"
DECODER = "pyparallel/models/decoder.py"
CONTEXT = "tests/ops/test_context_parallel_attention.py -k outputs_and_gradients"
PREFILL = "tests/decoding/test_cpu_prefill.py -k cache_holds"
HEADS = "tests/layers/test_parallel_attention.py -k equals_dense"
LOGITS = "tests/decoding/test_cpu_decoder.py -k logits_are_the_modules"
INT8 = "tests/decoding/test_int8_weights.py -k rounded_model"
TRANSFORMERS = "tests/models/test_decoder.py -k equals_transformers"
FIVE_LAYERS = "tests/training/test_pipeline.py -k five_layers"
DATA = "tests/training/test_data_parallel.py"
SEQUENCE = "tests/training/test_sequence_parallel.py -k as_dense"
RESUMED = "tests/saving/test_sharded_checkpoint.py -k training_goes_on"
CUT = "tests/models/test_parallelize.py -k dense"
TWO_STEPS = "tests/models/test_parallelize.py -k structure_ties"
HALF = "tests/decoding/test_cpu_decoder.py -k half_precision"
ROUNDED = "tests/decoding/test_cpu_decoder.py -k int8_logits"
STAGES = "tests/training/test_pipeline_hugging_face.py -k three_stages"
HALVES = "tests/training/test_data_parallel_engines.py -k any_module"
LATE = "tests/ops/test_shared_memory_all_reduce.py -k late_ranks"
DROPS = "tests/models/test_whole_calls.py -k does_not_depend"

# A row-parallel product as a bf16 accumulation would leave it, and with its bias counted twice, whatever
# multiplies.
COMPOSED = 'backend.compose("linear_all_reduce", linear_then_all_reduce, x, weight, bias, group)'
ROUNDED_SUM = (COMPOSED, f"{COMPOSED}.bfloat16().to(x.dtype)")
DOUBLED_BIAS = (COMPOSED, COMPOSED.replace("bias", "None if bias is None else 2 * bias"))
# The norms' weights and their biases in bf16; what the engine keeps is filled again from its source.
ROUNDED_NORM = (
    "return self._keep(module.weight), self._keep(bias)",
    "return self._keep(module.weight.detach().bfloat16().float()), self._keep(bias)",
)

MUTANTS = (
    Mutant(
        ATTENTION_BACKWARD,
        "ds = p * (wide_do @ wide_v.transpose(-1, -2) - delta)",
        "ds = p * (wide_do @ wide_v.transpose(-1, -2))",
        WITH_LSE,
    ),
    Mutant(
        ATTENTION_BACKWARD,
        "delta = (wide_do * wide_o).sum(-1, keepdim=True)",
        "delta = (wide_do * wide_o).sum(-1, keepdim=True).bfloat16().to(wide)",
        WITH_LSE,
    ),
    Mutant(
        ATTENTION,
        "        q.transpose(1, 2),\n        k.transpose",
        "        q.bfloat16().to(q.dtype).transpose(1, 2),\n        k.transpose",
        WITH_LSE,
    ),
    Mutant(
        ATTENTION,
        "return o.transpose(1, 2), lse",
        "return o.transpose(1, 2), lse.bfloat16().to(lse.dtype)",
        WITH_LSE,
    ),
    Mutant(
        MERGE,
        "o.mul_(keep).addcmul_(part_o.to(o.dtype), add)",
        "o.addcmul_(part_o.to(o.dtype), add)",
        CONTEXT,
    ),
    Mutant(
        MERGE,
        "addcmul_(part_o.to(o.dtype), add)",
        "addcmul_(part_o.bfloat16().to(o.dtype), add)",
        CONTEXT,
    ),
    Mutant(
        LAYER_NORM,
        "return F.layer_norm(x, x.shape[-1:], weight, bias, eps)",
        "return F.layer_norm(x, x.shape[-1:], weight, bias, eps * 2)",
        "tests/layers/test_norm.py tests/layers/test_sequence_parallel_norm.py",
    ),
    Mutant(
        LAYER_NORM,
        "return F.layer_norm(x, x.shape[-1:], weight, bias, eps)",
        "return F.layer_norm(x.bfloat16().to(x.dtype), x.shape[-1:], weight, bias, eps)",
        "tests/layers/test_norm.py",
    ),
    Mutant(
        RMS_NORM,
        "return F.rms_norm(x, x.shape[-1:], weight, eps)",
        "return F.rms_norm(x, x.shape[-1:], weight, eps).bfloat16().to(x.dtype)",
        "tests/layers/test_norm.py -k heads",
    ),
    Mutant(
        RMS_NORM,
        "return F.rms_norm(x, x.shape[-1:], weight, eps)",
        "return F.rms_norm(x, x.shape[-1:], weight, eps).bfloat16().to(x.dtype)",
        "tests/layers/test_sequence_parallel_norm.py -k as_dense",
    ),
    *(
        Mutant(ROW, *change, tests)
        for change in (ROUNDED_SUM, DOUBLED_BIAS)
        for tests in (HEADS, "tests/layers/test_parallel_mlp.py -k every_activation")
    ),
    Mutant(
        ENGINE,
        '"mlp_norm": self._norm(layer.mlp_norm)',
        '"mlp_norm": self._norm(layer.attention_norm)',
        LOGITS,
    ),
    Mutant(ENGINE, *ROUNDED_NORM, LOGITS),
    Mutant(ENGINE, *ROUNDED_NORM, PREFILL),
    Mutant(ENGINE, *ROUNDED_NORM, INT8),
    Mutant(
        ENGINE,
        '"softmax_scale": model.config.head_dim**-0.5',
        '"softmax_scale": model.config.head_dim**-0.5 * (1 + 2**-9)',
        PREFILL,
    ),
    Mutant(
        DECODER,
        "x = layer(x, span, held)",
        "x = layer(x, span, held).bfloat16().to(x.dtype)",
        TRANSFORMERS,
    ),
    Mutant(
        DECODER,
        "x = layer(x, span, held)",
        "x = layer(x, span, held).bfloat16().to(x.dtype)",
        FIVE_LAYERS,
    ),
    Mutant(
        DECODER,
        "x = layer(x, span, held)",
        "x = layer(x, span, held).bfloat16().to(x.dtype)",
        SEQUENCE,
    ),
    Mutant(
        DECODER,
        "x = layer(x, span, held)",
        "x = layer(x, span, held).bfloat16().to(x.dtype)",
        RESUMED,
    ),
    Mutant(ROW, *ROUNDED_SUM, CUT),
    Mutant(ROW, *DOUBLED_BIAS, CUT),
    Mutant(
        "pyparallel/training/data_engines.py",
        "return sums.start(bucket.buffer())",
        "return sums.start(bucket.buffer().bfloat16().float())",
        DATA,
    ),
    Mutant(
        "pyparallel/training/data_engines.py",
        "self.group.communicator.reduce_scatter(output_tensor, input_tensor)",
        "self.group.communicator.reduce_scatter(output_tensor, input_tensor.bfloat16().float())",
        DATA,
    ),
    Mutant(
        "pyparallel/training/data_engines.py",
        "return sums.start(bucket.buffer())",
        "return sums.start(bucket.buffer().bfloat16().float())",
        HALVES,
    ),
    # The first of the parameters does not count.
    Mutant(
        "pyparallel/training/grad_norm.py",
        "torch.stack([power_sum(replicated, norm_type, device), total])",
        "torch.stack([power_sum(replicated[1:], norm_type, device), total])",
        DATA,
    ),
    Mutant(
        "pyparallel/training/tied_gradients.py",
        "else own + other)",
        "else own + other.bfloat16().float())",
        STAGES,
    ),
    Mutant(
        "pyparallel/comm/raw.py",
        "work = group.communicator.all_reduce(result,",
        "result = result.bfloat16().to(result.dtype)\n    work = group.communicator.all_reduce(result,",
        TWO_STEPS,
    ),
    Mutant(
        "pyparallel/ops/cpu/linear_all_reduce.py",
        "wide = x.detach().float().contiguous()",
        "wide = x.detach().bfloat16().float().contiguous()",
        LATE,
    ),
    # Loss alone: gradients are what they were.
    Mutant(
        "pyparallel/training/pipeline.py",
        "loss.detach().float() for loss",
        "loss.detach().bfloat16().float() for loss",
        FIVE_LAYERS,
    ),
    Mutant(
        "pyparallel/training/pipeline.py",
        "total = torch.stack([loss.detach().float() for loss in losses]).sum()",
        "total = torch.stack([loss.detach().float() for loss in losses][1:] or losses[:1]).sum()",
        "tests/training/test_pipeline.py -k every_schedule",
    ),
    Mutant(
        "pyparallel/ops/vocab_parallel_cross_entropy.py",
        "loss = lse - (1.0 - label_smoothing) * target",
        "loss = (lse - (1.0 - label_smoothing) * target).bfloat16().to(lse.dtype)",
        SEQUENCE,
    ),
    # Every part of a sequence but the first begins a token late.
    Mutant(
        "pyparallel/models/whole_call.py",
        "length=shards.length, start=at)",
        "length=shards.length, start=at + (at > 0))",
        DROPS,
    ),
    Mutant(
        ENGINE,
        '"softmax_scale": model.config.head_dim**-0.5',
        '"softmax_scale": model.config.head_dim**-0.5 * (1 + 2**-4)',
        HALF,
    ),
    Mutant(
        ENGINE,
        '"softmax_scale": model.config.head_dim**-0.5',
        '"softmax_scale": model.config.head_dim**-0.5 * (1 + 2**-13)',
        ROUNDED,
    ),
)


if __name__ == "__main__":
    sys.exit(run_mutants(MUTANTS, sys.argv[1:]) > 0)
