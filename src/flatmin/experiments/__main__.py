"""``python -m flatmin.experiments NAME [--device …] [--out …]``"""

import argparse

from . import NAMES, run, save

parser = argparse.ArgumentParser(prog="python -m flatmin.experiments")
parser.add_argument("name", choices=NAMES)
parser.add_argument("--device", help="default: the GPU where there is one")
parser.add_argument("--out", default="results", help="folder of the record (default: results)")
parser.add_argument("--seeds", type=int, default=10)
parser.add_argument("--chunk-size", type=int, help="how many networks to train at once")
args = parser.parse_args()
dataset = run(args.name, device=args.device, seeds=args.seeds, chunk_size=args.chunk_size)
print(f"{args.name}: {save(args.name, dataset, args.out)}")
