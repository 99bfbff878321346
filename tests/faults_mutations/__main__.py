"""``python -m tests.faults_mutations --seed 1 --count 10000``: the campaign, as a table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict

from tests.faults_mutations.campaign import campaign, failed, table


def main() -> int:
    parser = argparse.ArgumentParser(description="Load mutated files.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="a line for each mutation")
    args = parser.parse_args()
    begin = time.monotonic()
    rows = campaign(args.seed, args.count, workers=args.workers)
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    print(table(rows), file=sys.stderr if args.json else sys.stdout)
    bad = failed(rows)
    for row in bad[:100]:
        print(
            f"seed {row.seed}: {row.files}, {row.what}: {row.verdict}: {row.detail}",
            file=sys.stderr,
        )
    print(f"{len(bad)} failed, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
