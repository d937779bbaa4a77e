"""Prints the README's table of knobs from Config; with --write puts it into README.md between its two markers.

    python scripts/knobs.py --write
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_gpt import Config  # noqa: E402  (the repository's root is not on the path before)

GROUPS = ("Model", "Run", "Data", "Schedule", "Evaluation", "Checkpoint", "Optimiser", "Objective", "Export")
BEGIN, END = "<!-- knobs: made by scripts/knobs.py -->", "<!-- end of knobs -->"


def table() -> str:
    """Markdown: one section a group, in the order of GROUPS."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for f in fields(Config):
        default = int(f.default) if isinstance(f.default, bool) else "1/127" if f.default == 1 / 127 else f.default
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        row = f"| `{f.name.upper()}` | {default} | {f.metadata['help']}{choices} |"
        groups[f.metadata["group"]].append(row)
    head = "| knob | default | meaning |\n|---|---|---|"
    return "\n\n".join(f"**{group}**\n\n{head}\n" + "\n".join(rows) for group, rows in groups.items())


def with_table(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        (ROOT / "README.md").write_text(with_table((ROOT / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
