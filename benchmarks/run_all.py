"""Run all benchmarks in one process, and write their page.

    python benchmarks/run_all.py [--device cuda] [--quick] [--record]

The options are those of a single benchmark.  Without ``--device``, all run on the CPU, then on the
GPU if there is one.  With ``--record``, all records and benchmarks/README.md are written.
"""

import importlib
import sys
import time

import report  # which imports common, before torch
import torch
from common import TOPICS


def main(arguments=None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    choices = [[]] if "--device" in arguments else [["--device", device] for device in devices]
    started = time.perf_counter()
    for device in choices:
        for topic in TOPICS:
            print(f"\n{'=' * 30} {' '.join([topic, *device])}", flush=True)
            topic_started = time.perf_counter()
            importlib.import_module(topic).main([*arguments, *device])
            print(f"\n{topic}: {time.perf_counter() - topic_started:.0f} s", flush=True)
    if "--record" in arguments:
        report.main()
    print(f"\nall benchmarks: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
