"""Configurations over seeds: what each scores and weighs, which are better than the control, and why to doubt it.

    python scripts/report.py logs --control base
    python scripts/report.py logs/sweep_width.json --html report.html --markdown report.md --sqlite report.sqlite
    python scripts/report.py logs/a_s1 logs/a_s2 logs/b_s1 logs/b_s2 --control a --smallest-effect 0.001 --cap 1000000

A PATH is a run's folder, a folder of runs, or the ledger of a sweep, which names arms and control itself. Everything is
read from config.json, summary.json and metrics.jsonl; the score is that of the artifact after reading it back. Prints, top
first: the traps found (runs missing, mixed, repeated, timed, scored on another text, ...), the verdicts, the arms, and the
knobs in which each differs from the control. paired.py says how a verdict is reached. --sqlite replaces FILE by the tables
runs, arms, comparisons and flags; --html writes one page that needs nothing but itself. Equal inputs give equal bytes.
"""
from __future__ import annotations

import argparse
import importlib.util
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import export  # noqa: E402  (the repository's root is not on the path before)
import export_verbs  # noqa: E402

if TYPE_CHECKING:
    from arms import Study


# ----------------------------------------------------------------------------------------------------------------------
# Command line.
# ----------------------------------------------------------------------------------------------------------------------


def bytes_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"wanted a number of bytes, got {text!r}")
    return int(text)


def effect(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted bits per byte above 0, got {text!r}")
    return value


def command_line() -> argparse.ArgumentParser:
    parser = export_verbs.OneLineParser(prog="report.py", description="Compares configurations over seeds.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run's folder, a folder of runs, or a sweep's ledger")
    parser.add_argument("--control", metavar="ARM", help="what the others are compared with; default: the ledger's")
    parser.add_argument("--score", metavar="NAME,...", help="the first of these eval_modes that a run has is its score, else"
                                                            " the plain one; default: the ledger's")
    parser.add_argument("--smallest-effect", type=effect, default=0.0005, metavar="BPB",
                        help="the smallest difference that matters, in bits per byte; default: %(default)s")
    parser.add_argument("--cap", type=bytes_number, metavar="BYTES", help="of the total, 0 = none; default: each run's")
    parser.add_argument("--title", default="Report", help="heads the page and the Markdown")
    for flag, text in (("markdown", "tables, flags and runs"), ("html", "the same with plots, as one page"),
                       ("sqlite", "the numbers behind all tables")):
        parser.add_argument(f"--{flag}", metavar="FILE", help=text)
    return parser


def html(study: Study, title: str) -> str:
    """The page; only this needs matplotlib."""
    import report_plots
    import report_tables as tables
    from report_page import Page, page
    return page(Page(title, tables.headline(study), tables.facts(study), tables.tables(study), study.flags,
                     report_plots.plots(study), tables.run_table(study), tables.legend(study)))


def outputs(args: argparse.Namespace, study: Study) -> dict[str, bytes]:
    """path -> contents of the files asked for."""
    import report_tables as tables
    found = {}
    if args.markdown:
        found[args.markdown] = tables.markdown(study, args.title).encode()
    if args.html:
        found[args.html] = html(study, args.title).encode()
    if args.sqlite:
        found[args.sqlite] = tables.sqlite_bytes(tables.as_rows(study))
    return found


def check_packages(args: argparse.Namespace) -> None:
    for package, what in (("scipy", "the report"), *([("matplotlib", "--html")] if args.html else [])):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{what} needs {package}: pip install {package}")


def main(arguments: list[str]) -> int:
    """Prints the report; every fault of the input becomes one line and exit code 2, with nothing written."""
    args = command_line().parse_args(arguments)
    try:
        check_packages(args)
        from arms import read_study
        from report_tables import terminal_lines
        study = read_study(args.paths, args.control, args.smallest_effect, args.cap, args.score)
        for path, data in outputs(args, study).items():
            export.write_atomically(Path(path), data)
    except (ValueError, OSError) as fault:
        print(f"report.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    print("\n".join(terminal_lines(study)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it without a word
    sys.exit(main(sys.argv[1:]))
