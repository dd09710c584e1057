"""``python -m flatmin.book.experiments NAME``: run an experiment, or resume it."""

import argparse
import json
import sys
from pathlib import Path

from .display import duration
from .records import NAMES, experiment, record, record_path
from .runner import Plan, describe, plan, run


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m flatmin.book.experiments",
        description="Run an experiment and write its record. "
        "It may be killed at any moment; the same command resumes it. On several GPUs: torchrun "
        "--nproc-per-node=N -m flatmin.book.experiments NAME",
    )
    option = command.add_argument
    option("name", nargs="?", help=f"one of {', '.join(NAMES)}")
    option("--size", help="tiny, reduced, paper or another of the experiment's sizes")
    option("--seeds", type=int, help="how many seeds")
    option(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="replace the value of a setting, in JSON; may be given several times",
    )
    option("--device", help="default: the GPU if there is one")
    option("--out", default="results", help="folder of the record (default: results)")
    option("--estimate", action="store_true", help="list the units and their time, run nothing")
    option("--list", action="store_true", help="list the experiments")
    return command


def setting(word: str):
    """``KEY=VALUE`` as a pair; a value that is not JSON is a string.

    >>> setting("lr=0.1"), setting("optimizer=SGD")
    (('lr', 0.1), ('optimizer', 'SGD'))
    """
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"--set must be KEY=VALUE, got {word!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def listing() -> str:
    """One line per experiment."""
    lines = []
    for name in NAMES:
        try:
            recorded = "recorded on {device}, size {size}".format(**record(name).attrs)
        except FileNotFoundError:
            recorded = "not yet recorded"
        module = experiment(name)
        lines.append(f"{name} ({', '.join(module.SETTINGS)}): {module.SOURCE}; {recorded}")
    return "\n".join(lines)


def estimate(todo: Plan) -> str:
    """The units, one per line, and how long they take."""
    time = "no record to estimate the time from"
    if known := todo.seconds():
        seconds, reference = known
        time = (
            f"about {duration(seconds)} at the rate of the record on {reference.attrs['device']}, "
            "for the same time per gradient; a larger network takes longer"
        )
    total = f"{len(todo.units)} units, {todo.cost:.2g} single-example gradients"
    return "\n".join([*map(describe, todo.units), f"{todo.name}, {todo.title}: {total}, {time}"])


def main(words: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(words)
    if args.list:
        print(listing())
        return 0
    if args.name is None:
        command.error("name an experiment, or ask for the --list of them")
    try:
        changes = {"seeds": args.seeds, "settings": dict(map(setting, args.changes))}
        todo = plan(args.name, args.size, **changes)
    except ValueError as error:
        command.error(str(error))
    if args.estimate:
        print(estimate(todo))
        return 0
    folder = Path(args.out) / f"{args.name}.parts"
    done = lambda: (
        f"{len(todo.units) - len(todo.missing(folder))} of {len(todo.units)} units are done"
    )
    try:
        result = run(args.name, args.size, out=args.out, device=args.device, **changes)
    except KeyboardInterrupt:
        print(
            f"{args.name}: interrupted, {done()}; the same command computes the others, "
            "and the unfinished unit anew"
        )
        return 130
    if result is None:
        print(f"{args.name}: this rank has finished, {done()}; the last rank writes the record")
    else:
        path = record_path(args.name, args.out, args.size)
        print(f"{args.name}: wrote {path}, {duration(result.attrs['seconds'])} of computing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
