"""Time of `import hf_multitask` against `from transformers import Trainer`: fresh processes in turns, medians.

python recipes/benchmarks/import_time.py [--write]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from common import describe, write_result

STATEMENTS = {"hf_multitask": "import hf_multitask", "Trainer": "from transformers import Trainer"}
CODE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write import_time.json")
    parser.add_argument("--processes", type=int, default=5)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for turn in range(arguments.processes + 1):
        for name, statement in STATEMENTS.items():
            run = subprocess.run(
                [sys.executable, "-c", CODE.format(statement)], capture_output=True, text=True, check=True
            )
            if turn:  # the first reads the files from disk
                times[name].append(float(run.stdout))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "median seconds": medians,
        "hf_multitask over Trainer": medians["hf_multitask"] / medians["Trainer"],
        "bound": 1.1,
        "setting": {"processes": arguments.processes, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
