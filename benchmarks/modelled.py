"""Count the compiled GPU kernels in the emulator and write results/modelled.json.

No GPU takes part: registers and instructions are read from machine code, sectors are counted, and
times are modelled (tests/helpers/ptxemu/model.py). `benchmarks/readme.py` makes tables of what
this writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "helpers")]

from modelled_tables import modelled_in_full  # noqa: E402

from emulation import Workers, compiles  # noqa: E402
from measures import BACKENDS, BINS, COUNT, DTYPES, GPU_OF, cases, measure  # noqa: E402


def main() -> int:
    """Run, print, write; 1 if any result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "modelled.json")
    parser.add_argument("--bins", type=int, action="append", choices=BINS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    arguments = parser.parse_args()
    backends = arguments.backend or [name for name in BACKENDS if compiles(name) is None]
    wanted = cases(arguments.bins or BINS, arguments.dtype or DTYPES, backends)
    workers, kernels, wrong = Workers(wanted), [], 0
    for case in wanted:
        outcome = workers.outcome(case)
        if outcome.faults:
            print(f"{case}: {'; '.join(outcome.faults)}", file=sys.stderr)
            wrong += 1
            continue
        found = {name: rounded(value) for name, value in asdict(measure(case, outcome)).items()}
        words = ("backend", "op", "dtype", "bins", "layout", "arch")
        named = {name: getattr(case, name) for name in words} | {"kernel": outcome.kernel}
        kernels.append(named | {"gpu": GPU_OF[case.arch]} | found)
    workers.close()
    recorded = {"distributions": COUNT, "peers": PEERS, "kernels": kernels}
    arguments.out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(modelled_in_full(recorded))
    return 1 if wrong else 0


def rounded(value: object) -> object:
    """Floats to three digits behind the point."""
    return round(value, 3) if isinstance(value, float) else value


# What torch 2.14.1's Inductor generates for sm_90, run and modelled in the same way at 1 048 576
# distributions (decode: 16 × 8400 anchors × 4 sides) with K = 16: microseconds on an H100 that are
# modelled for it and for the least traffic of one fused pass, launches of 2.5 µs included.
PEERS = [
    {"work": "Ultralytics 8.4.190 `DFLoss`, forward + backward", "dtype": "fp32", "launches": 7,
     "microseconds": 240, "fused": 70.8},
    {"work": "Ultralytics 8.4.190 `DFLoss`, forward + backward", "dtype": "bf16", "launches": 7,
     "microseconds": 165, "fused": 38.1},
    {"work": "Ultralytics `DFL`, forward", "dtype": "fp32", "launches": 3,
     "microseconds": 48.1, "fused": 11.9},
    {"work": "Ultralytics `DFL`, forward", "dtype": "fp16", "launches": 3,
     "microseconds": 32.0, "fused": 5.9},
    {"work": "DFLoss rewritten without a gather, forward + backward", "dtype": "fp32",
     "launches": 3, "microseconds": 79.6, "fused": 70.8},
    {"work": "DFLoss rewritten without a gather, forward + backward", "dtype": "bf16",
     "launches": 3, "microseconds": 48.5, "fused": 38.1},
    {"work": "softmax × project, forward", "dtype": "fp32", "launches": 1,
     "microseconds": 12.9, "fused": 11.9},
    {"work": "softmax × project, forward", "dtype": "fp16", "launches": 1,
     "microseconds": 18.9, "fused": 5.9},
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
