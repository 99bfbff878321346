"""What a model's generation_config.json asks of generate(): stops, penalties, how tokens are drawn.

As transformers reads it: where the file is, the ids that end a text are its own alone; without it they
are the config's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.ops.logit_rules import LogitRules
from pyparallel.ops.next_token import Sampling

NAME = "generation_config.json"
MOST_BYTES = 1 << 20

# What generate() can't do, and the values that ask for nothing.
UNKNOWN: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "penalty_alpha": (None, 0.0),
    "guidance_scale": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "num_return_sequences": (None, 1),
    "stop_strings": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "max_time": (None,),
}
# Those of drawing alone.
UNKNOWN_DRAWS: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What generate() does where its caller does not say.

    Attributes:
        stop_ids: what ends a text; None: the config's.
        rules, sampling: how a token is chosen.
        refused: why the file's way to choose can't be followed; or None.
    """

    stop_ids: tuple[int, ...] | None = None
    rules: LogitRules | None = None
    sampling: Sampling = field(default_factory=Sampling)
    refused: str | None = None


def read_generation(path: str | Path) -> GenerationDefaults:
    """The defaults in the folder of a checkpoint, of which ``path`` is the folder or a file.

    Raises:
        CheckpointError: the file is no JSON object, or a value in it can't be.
    """
    folder = Path(path)
    file = (folder if folder.is_dir() else folder.parent) / NAME
    if folder.suffix == ".gguf" or not file.is_file():
        return GenerationDefaults()
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"expected at most {MOST_BYTES} bytes, got {file.stat().st_size}")
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got a {type(values).__name__}")
        return generation_defaults(values)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def asked_sampling(
    defaults: GenerationDefaults, max_new_tokens: int, **asked: float | int | None
) -> Sampling:
    """How a command's tokens are chosen: by its flags, and by the file where a flag is not given.

    Args:
        asked: temperature, top_k, top_p and seed; None where a flag was not given.

    Raises:
        ValueError: no temperature is given, and the file's way can't be followed.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if "temperature" not in given and defaults.refused is not None:
        raise ValueError(f"{defaults.refused}, here --temperature")
    rules = defaults.rules
    if rules is not None:
        rules = replace(rules, max_new_tokens=max_new_tokens)
    return replace(defaults.sampling, rules=rules, **given)


def generation_defaults(values: Mapping[str, Any]) -> GenerationDefaults:
    """What the values of a generation_config.json ask for.

    Raises:
        ValueError: it names the value.
    """
    draws = bool(values.get("do_sample", False))
    unknown = {**UNKNOWN, **(UNKNOWN_DRAWS if draws else {})}
    asked = [name for name, off in unknown.items() if values.get(name) not in off]
    refused = None
    if asked:
        refused = (
            f"{NAME}: {asked[0]}: expected {unknown[asked[0]][-1]}, got {values[asked[0]]!r}, which "
            f"generate() does not know; give sampling= to choose tokens without it"
        )
    stops = _ids(values, "eos_token_id")
    decay = values.get("exponential_decay_length_penalty")
    biases = values.get("sequence_bias") or ()
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    rules = LogitRules(
        repetition_penalty=_number(values, "repetition_penalty", 1.0, above=0.0),
        no_repeat_ngram_size=int(_number(values, "no_repeat_ngram_size", 0)),
        sequence_bias=tuple((tuple(map(int, ids)), float(bias)) for ids, bias in pairs),
        bad_words=tuple(
            word
            for word in (tuple(map(int, ids)) for ids in values.get("bad_words_ids") or ())
            if word and word not in {(stop,) for stop in stops}
        ),
        min_length=int(_number(values, "min_length", 0)) if stops else 0,
        min_new_tokens=int(_number(values, "min_new_tokens", 0)) if stops else 0,
        forced_bos=next(iter(_ids(values, "forced_bos_token_id")), None),
        forced_eos=_ids(values, "forced_eos_token_id"),
        decay=None if decay is None else (int(decay[0]), float(decay[1])),
        suppress=_ids(values, "suppress_tokens"),
        begin_suppress=_ids(values, "begin_suppress_tokens"),
        stops=stops,
    )
    sampling = Sampling()
    if draws:
        sampling = Sampling(
            temperature=_number(values, "temperature", 1.0, above=0.0),
            top_k=int(_number(values, "top_k", 50)),
            top_p=_number(values, "top_p", 1.0, above=0.0),
            min_p=_number(values, "min_p", 0.0),
        )
    return GenerationDefaults(stops, rules if rules.active else None, sampling, refused)


def _number(
    values: Mapping[str, Any], name: str, default: float, *, above: float | None = None
) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if value < 0 or (above is not None and value <= above):
        raise ValueError(
            f"{name}: expected {'more than 0' if above == 0 else '0 or more'}, got {value}"
        )
    return value


def _ids(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = values.get(name)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{name}: expected an id or a list of ids, got {value!r}")
    return tuple(ids)
