"""What users of a replica see: time to first token, time per token, tokens a second.

Three ways to be asked:

* :func:`answer_batch`: a batch of prompts that come and are answered together, as ``generate`` does.
* :func:`serve`: clients who ask again as soon as they are answered, each request joining the running
  batch (continuous batching). A token then waits for the prefills of others as well. While one request
  makes its O tokens, of the other C - 1 those are prefilled that are not waiting for their first token
  themselves, the share O tpot / (ttft + O tpot)::

      tpot = decode step (C) + (C - 1) prefill tpot / (ttft + O tpot)
      ttft = prefill (1 + w (C - 1)) + 0.074 s

  w: how often a prompt finds another before it. An engine that reads all prompts it has before it goes
  on answering makes its clients come in waves, so half of them: 0.5. For others 0.076, which like the
  0.074 s that a server takes for a request is fitted to ``infer_serving_dense_tp_sweeps.json``, all of
  them and all GPUs together.
* :func:`serve_all`: more requests than fit, all at once: as many run as the KV cache has room for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyparallel.planner.engine_rates import EngineRates
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.inference_time import StageWork, Terms, pass_terms, pass_works
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Inference, Strategy

# Sequences that an engine runs at once where memory does not bind; tokens that one prefill takes.
MAX_SEQUENCES = 2048
PREFILL_TOKENS = 8192
# Of ``ttft`` in a closed loop; see above.
WAITS = 0.076
WAITS_IN_WAVES = 0.5
REQUEST_S = 0.074


@dataclass(frozen=True)
class Speed:
    """Of one replica.

    Attributes:
        ttft_s: seconds to the first token.
        tpot_s: seconds of each later one.
        tokens_per_s: tokens that all its sequences get, prefills counted in the time.
        prefill, step: where the seconds of one prefill and of one decode step go.
        running: sequences at once.
        queued: whether requests wait for room in the KV cache.
    """

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    prefill: Terms
    step: Terms
    running: float
    queued: bool = False


def answer_batch(
    shape: ModelShape, cluster: Cluster, strategy: Strategy, work: Inference, engine: EngineRates
) -> Speed:
    """``work.batch`` prompts on each replica, read together, then answered token by token."""
    step, tpot = _decode(shape, cluster, strategy, work, engine, work.batch)
    prefill, ttft = _prefill(shape, cluster, strategy, work, engine, work.batch)
    made = work.batch * work.output
    seconds = ttft + (work.output - 1) * tpot
    return Speed(ttft, tpot, made / seconds, prefill, step, work.batch)


def serve(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    work: Inference,
    engine: EngineRates,
    *,
    concurrency: int,
    kv_tokens: float = math.inf,
) -> Speed:
    """``concurrency`` clients of one replica, with room for ``kv_tokens`` tokens of context."""
    # An engine that does not reserve has sequences of every age at once.
    held = work.length if engine.reserves else work.prompt + work.output / 2
    running = max(1.0, min(concurrency, kv_tokens / held))
    step, alone = _decode(shape, cluster, strategy, work, engine, running)
    prefill, first = _prefill(shape, cluster, strategy, work, engine, 1)
    slowest = pass_terms(
        _prefill_works(shape, cluster, strategy, work, engine, 1), engine.constants
    )
    waits = WAITS_IN_WAVES if engine.prefills_first else WAITS
    ttft = first * (1 + waits * (concurrency - 1)) + REQUEST_S
    # O t^2 + (ttft - O alone - (C - 1) prefill) t - alone ttft = 0.
    others = (running - 1) * slowest[1].total
    half = (work.output * alone + others - ttft) / 2
    tpot = (half + math.sqrt(half**2 + work.output * alone * ttft)) / work.output
    rate = running / (tpot + first / work.output)
    return Speed(ttft, tpot, rate, prefill, step, running, concurrency > running)


def serve_all(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    work: Inference,
    engine: EngineRates,
    *,
    kv_tokens: float,
) -> Speed:
    """More requests than fit; tokens a second when nothing but memory limits how many run."""
    held = work.length if engine.reserves else work.prompt + work.output / 2
    running = max(1.0, min(MAX_SEQUENCES, kv_tokens / held))
    step, alone = _decode(shape, cluster, strategy, work, engine, running)
    # Prompts are read many at a time, without a pass's overhead for each.
    together = max(1.0, min(running, PREFILL_TOKENS / work.prompt))
    works = _prefill_works(shape, cluster, strategy, work, engine, together)
    whole, slowest = pass_terms(works, engine.constants)
    seconds = slowest.total - slowest.overhead
    tpot = alone + running / work.output * seconds / together
    rate = running / tpot
    return Speed(whole.total, tpot, rate, whole, step, running, True)


def _decode(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    work: Inference,
    engine: EngineRates,
    running: float,
) -> tuple[Terms, float]:
    """Where a step's time goes, and the seconds between two tokens of one sequence.

    Over stages the sequences are cut into as many parts as there are stages, which follow each other:
    a part's next token comes when it is through all of them, or when the slowest has served all parts.
    """
    context = work.prompt + work.output / 2
    each = max(1.0, running / strategy.pp)
    works = pass_works(
        shape,
        cluster,
        strategy,
        work,
        sequences=each,
        tokens=1,
        context=context,
        kernel=engine.kernel,
    )
    whole, slowest = pass_terms(works, engine.constants)
    parts = min(strategy.pp, math.ceil(running))
    return whole, max(whole.total, parts * slowest.total)


def _prefill(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    work: Inference,
    engine: EngineRates,
    sequences: int,
) -> tuple[Terms, float]:
    """Where the time goes, and the seconds until the last of ``sequences`` prompts is read."""
    parts = min(strategy.pp, sequences)
    works = _prefill_works(shape, cluster, strategy, work, engine, sequences / parts)
    whole, slowest = pass_terms(works, engine.constants)
    return whole, whole.total + (parts - 1) * slowest.total


def _prefill_works(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    work: Inference,
    engine: EngineRates,
    sequences: float,
) -> tuple[StageWork, ...]:
    return pass_works(
        shape,
        cluster,
        strategy,
        work,
        sequences=sequences,
        tokens=work.prompt,
        context=0,
        kernel=engine.kernel,
    )
