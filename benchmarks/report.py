"""Write benchmarks/README.md from the records in results/.

python benchmarks/report.py
"""

import importlib
import json
from pathlib import Path

from common import HERE, RESULTS, TOPICS, notes, ratio_text, record_file, seconds_text

from flatmin._files import replace

TITLES = {
    "stack": "The stack",
    "sam": "A step of SAM",
    "m_sam": "m-SAM",
    "stiffness": "Stiffness",
    "spectrum": "The Hessian's spectrum",
    "mixup": "Mixup",
}
HEAD = """# Benchmarks

`python benchmarks/report.py` writes this page from the records in `results/`. `make bench` runs all benchmarks, on the CPU with one thread and on a GPU if there is one, and writes the page. To run one of them: `python benchmarks/TOPIC.py [--device cuda] [--quick] [--record]`.

The sides of a table take turns in one process. For the first side, the table gives the median time; for the others, the ratio to the first, above 1 if they are slower: the median over the turns, with the quartiles in brackets. The **floor** is the least time that the task can take: its multiplications at the rate of a large matrix product, or its bytes at the rate of a copy, both measured in the same process. The number in brackets says how many times as long the first side takes.
"""


def table(part: dict) -> list[str]:
    """One part of a record as a table in Markdown."""
    rows, unit = part["rows"], part["unit"]
    cases = list(dict.fromkeys(name for row in rows for name in row["case"]))
    sides = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    sides.sort(key=lambda name: name != unit)  # the unit comes first
    lines = [[*cases, *sides, "floor", "turns"], ["---"] * (len(cases) + len(sides) + 2)]
    for row in rows:
        cells = [number(row["case"][name]) for name in cases]
        for name in sides:
            side = row["sides"].get(name)
            cells.append("–" if side is None else cell(side, name == unit))
        floor = row["floor"]
        times = floor and row["sides"][unit]["seconds"] / floor["seconds"]
        floor_text = (
            f"{seconds_text(floor['seconds'])} ({floor['of']}; {times:.3g}×)" if floor else "–"
        )
        lines.append([*cells, floor_text, number(row["turns"])])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def cell(side: dict, unit: bool) -> str:
    text = seconds_text(side["seconds"]) if unit else ratio_text(side)
    return "; ".join([text, *notes(side)])


def number(value) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def section(topic: str, folder: Path) -> list[str]:
    question, *_ = importlib.import_module(topic).__doc__.split("\n")
    lines = [
        f"\n## {TITLES[topic]}\n",
        f"{question} `{topic}.py` says what is measured, and how.\n",
    ]
    files = [record_file(topic, device, folder) for device in ("cpu", "cuda")]
    for file in [file for file in files if file.exists()]:
        record = json.loads(file.read_text(encoding="utf-8"))
        setting = ", ".join(f"{name} {value}" for name, value in record["setting"].items())
        lines.append(f"`{file.name}`: {setting}.")
        for part in record["parts"].values():
            lines += [f"\n**{part['title']}.**\n", *table(part)]
        lines.append("")
    return lines[:-1] if len(lines) > 2 else [*lines, "Not recorded yet."]


def page(folder: Path = RESULTS) -> str:
    lines = [line for topic in TOPICS for line in section(topic, folder)]
    return "\n".join([HEAD.rstrip(), *lines]) + "\n"


def main() -> None:
    replace(HERE / "README.md", page())
    print(f"written: {HERE / 'README.md'}")


if __name__ == "__main__":
    main()
