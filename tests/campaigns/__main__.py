"""``python -m tests.campaigns``: run the campaigns, print a table, fail if anything is found."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from importlib import import_module

from tests.campaigns.rows import DEATH_S, STOP_S, VERDICTS, Row

# Modules of this package, with the number of faults that `make faults` asks of each.
CAMPAIGNS = {"processes": 1000, "strangers": 40, "paths": 200, "mutations": 10_000}


def run(names: list[str], seed: int, count: int | None) -> int:
    """Run the campaigns, each with its table at its end; how many faults were not "ok"."""
    bad = 0
    for name in names:
        asked = CAMPAIGNS[name] if count is None else count
        started = time.monotonic()
        rows = import_module(f"{__package__}.{name}").campaign(seed, asked)
        print(f"\n{name}: {time.monotonic() - started:.0f} s, seed {seed}")
        bad += show(rows)
    return bad


def show(rows: list[Row]) -> int:
    """Print the table; the number of faults whose verdict is not "ok", and of late ends."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.campaign, row.phase, row.fault].append(row)
    print(
        f"{'campaign':12}{'phase':12}{'fault':18}{'n':>6}  " + "".join(f"{v:>7}" for v in VERDICTS)
    )
    for (campaign, phase, fault), found in sorted(groups.items()):
        counts = [sum(row.verdict == verdict for row in found) for verdict in VERDICTS]
        line = "".join(f"{count:7}" for count in counts)
        print(f"{campaign:12}{phase:12}{fault:18}{len(found):6}  {line}")
    bad = [row for row in rows if row.verdict != "ok"]
    for ends, most in (("death", DEATH_S), ("stop", STOP_S)):
        times = [row.seconds for row in rows if row.ends == ends]
        if times:
            print(
                f"worst time to end a {ends}: {max(times):.2f} s of {most:g} ({len(times)} faults)"
            )
        bad += [row for row in rows if row.ends == ends and row.seconds > most and row not in bad]
    for row in bad[:20]:
        print(
            f"{row.campaign}/{row.phase}/{row.fault}: {row.verdict}, {row.seconds:.2f} s, {row.detail}"
        )
    totals = ", ".join(f"{sum(r.verdict == v for r in rows)} {v}" for v in VERDICTS[1:])
    print(f"{len(rows)} faults: {totals}", flush=True)
    return len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CAMPAIGNS), metavar="CAMPAIGN")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="faults of each; default: as make faults")
    args = parser.parse_args()
    if unknown := set(args.names) - set(CAMPAIGNS):
        parser.error(f"expected of {', '.join(CAMPAIGNS)}, got {', '.join(sorted(unknown))}")
    return 1 if run(args.names, args.seed, args.count) else 0


if __name__ == "__main__":
    sys.exit(main())
