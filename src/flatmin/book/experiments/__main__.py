"""``python -m flatmin.book.experiments NAME``: run an experiment, or resume it."""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

from .display import duration
from .records import NAMES, experiment, record, record_path
from .runner import describe, plan, run


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
    option(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for other ranks without a sign of life (default: 600)",
    )
    option(
        "--estimate",
        action="store_true",
        help="list the units and estimate their time, run nothing",
    )
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
        lines.append(
            f"{name} ({', '.join(experiment(name).SETTINGS)}): "
            f"{experiment(name).SOURCE}; {recorded}"
        )
    return "\n".join(lines)


def estimate(todo) -> str:
    """The units, one per line, and how long they take."""
    known = todo.seconds()
    time = "no record to estimate the time from"
    if known:
        seconds, reference = known
        time = (
            f"about {duration(seconds)} at the rate of the record on {reference.attrs['device']}, "
            "for the same time per gradient; a larger network takes longer"
        )
    return "\n".join(
        [
            *map(describe, todo.units),
            f"{todo.name}, {todo.title}: {len(todo.units)} units, "
            f"{todo.cost:.2g} single-example gradients, {time}",
        ]
    )


def main(words: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(words)
    if args.list:
        print(listing())
        return 0
    if args.name is None:
        command.error("name an experiment, or ask for the --list of them")
    started = time.monotonic()
    try:
        settings = dict(map(setting, args.changes))
        todo = plan(args.name, args.size, seeds=args.seeds, settings=settings)
    except ValueError as error:
        command.error(str(error))
    if args.estimate:
        print(estimate(todo))
        return 0
    say = lambda text, **where: print(f"{args.name}: {text}", flush=True, **where)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(message, file=sys.stderr)
            done = run(
                args.name,
                args.size,
                out=args.out,
                device=args.device,
                seeds=args.seeds,
                settings=settings,
                patience=args.patience,
            )
    except KeyboardInterrupt:
        missing = todo.missing(Path(args.out) / f"{args.name}.parts")
        say(
            f"interrupted, {len(todo.units) - len(missing)} of {len(todo.units)} units are done; "
            "run the same command to resume"
        )
        return 130
    except TimeoutError as error:
        say(error)
        return 1
    took = time.monotonic() - started
    if done is None:
        say(f"this rank's units are done, in {took:.0f} s")
    else:
        say(
            f"wrote {record_path(args.name, args.out, args.size)} ({len(todo.units)} units, "
            f"{done.attrs['seconds']:.0f} s of computing; this call {took:.0f} s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
