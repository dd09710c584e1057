"""Do all claims hold for other seeds? Executes the chapters with FLATMIN_SEED=1..5.

python tools/claims.py [NAME ...]
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from notebooks import BOOK, chapters, execute_all, key, read, read_text, sync

from flatmin._files import print_line

sys.path.insert(0, str(BOOK / "_ext"))
from flatmin_book import claims_in  # noqa: E402  (as the book lists them)

SEEDS = range(1, 6)
MARKS = {True: "✓", False: "✗", None: "–"}


def holds(log):
    """{claim: whether it always held} from the lines that `flatmin.book.claim` wrote."""
    held = {}
    for line in read(log).splitlines() if log.exists() else ():
        entry = json.loads(line)
        held[entry["id"]] = held.get(entry["id"], True) and entry["holds"]
    return held


def main(names):
    paths = chapters(names)
    for path in paths:
        sync(path)
    with TemporaryDirectory() as folder:
        logs = {
            (key(path), seed): Path(folder, f"{key(path).replace('/', '-')}-{seed}.jsonl")
            for path in paths
            for seed in SEEDS
        }
        crashed = execute_all(
            [
                (
                    f"{key(path)}, seed {seed}",
                    read_text(path),
                    {"FLATMIN_SEED": str(seed), "FLATMIN_CLAIMS_LOG": str(logs[key(path), seed])},
                )
                for path in paths
                for seed in SEEDS
            ]
        )
        verdicts = {key: holds(log) for key, log in logs.items()}

    good = total = 0
    for path in paths:
        ids = [name for name, _ in claims_in(path.with_suffix(".ipynb"))]
        print(f"\n{key(path):<50} seed {'  '.join(map(str, SEEDS))}")
        for name in ids:
            # None: the chapter never reached the claim
            row = [verdicts[key(path), seed].get(name) for seed in SEEDS]
            print_line(f"  {name:<53}{'  '.join(MARKS[held] for held in row)}")
            good, total = good + sum(held is True for held in row), total + len(row)
    print(f"\nclaims: {good} of {total} hold, {len(crashed)} chapter runs crashed")
    return 0 if good == total and not crashed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
