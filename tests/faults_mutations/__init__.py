"""A campaign of mutated files: every one is refused in a line, or answered as what it then is.

``campaign(seed, count)`` gives a row for each mutation; ``python -m tests.faults_mutations`` prints a
table, and fails where a row does. The verdicts:

- ``refused``: a ValueError of one line, in time;
- ``equal``: the logits of the file that was not mutated;
- ``another``: other logits, which are those of a plain reference on the same files: transformers' own
  class for what is Hugging Face's; the gguf package's reader and transformers' Llama for a GGUF; boxes
  pasted together one by one for a sharded checkpoint. (A changed eps, or a changed weight, is such.)

Everything else is a failure: ``wrong`` (other logits than the reference's, or where the reference finds
no model), ``raised`` (another error, or several lines), ``hung``, ``crashed``.
"""

from tests.faults_mutations.campaign import Row, campaign, failed, judged, table

__all__ = ["Row", "campaign", "failed", "judged", "table"]
