"""Run all benchmarks, one after the other in one process, and write their page.

    python benchmarks/run_all.py [--device cuda] [--quick] [--record]

takes the options of a single one.  Without ``--device`` it is the CPU, and then the GPU where there
is one; with ``--record`` it writes all records and benchmarks/README.md.
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
            begun = time.perf_counter()
            importlib.import_module(topic).main([*arguments, *device])
            print(f"\n{topic}: {time.perf_counter() - begun:.0f} s", flush=True)
    if "--record" in arguments:
        report.main()
    print(f"\nall benchmarks: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
