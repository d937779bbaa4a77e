"""Runs a program of Python and writes down what it opens: files, sockets, libraries, other programs.

    python scripts/watched.py RECORD export.py eval FILE --data DIR --tokenizer MODEL

The record has a line of JSON for each different thing, [event, what], as Python's audit hooks tell it (PEP 578), from the
first import of the program on. They tell of what goes through Python; libraries of C and Rust can open files by themselves,
so scripts/audit.py also runs the program in a folder where nothing else is.
"""
from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

EVENTS = ("ctypes.dlopen", "socket.", "urllib.", "http.client.", "ftplib.", "smtplib.", "sqlite3.connect",
          "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork")


def watch(record: str) -> None:
    """From here to the end of the process; there is no way to take a hook back."""
    file = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    seen: set[tuple[str, str]] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[0], (str, bytes)):      # a descriptor, opened before
                return
            what = os.path.abspath(os.fsdecode(arguments[0]))
        elif event.startswith(EVENTS):
            what = str(arguments[0] if event == "ctypes.dlopen" else arguments)[:200]
        else:
            return
        if (event, what) not in seen:
            seen.add((event, what))
            os.write(file, (json.dumps([event, what]) + "\n").encode())

    sys.addaudithook(note)


def main(arguments: list[str]) -> None:
    record, program = arguments[:2]
    sys.argv = arguments[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    watch(record)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python scripts/watched.py RECORD PROGRAM [ARGUMENT ...]")
    main(sys.argv[1:])
