"""The README tells the truth: its knob table is Config's, its files and commands exist.

    bash scripts/test.sh tests/test_readme.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_knob_table_is_the_one_that_config_gives():
    table = subprocess.run([sys.executable, "scripts/knobs.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table.count("| `") == len(fields(train_gpt.Config)) >= 60
    assert table.strip() in README, "run: python scripts/knobs.py --write"


def test_every_file_that_the_readme_names_exists():
    named = set(re.findall(r"(?:^|[\s`])((?:data|scripts|tests|logs|\.ci)/[\w./-]*\w)", README))
    named |= set(re.findall(r"(?:^|[\s`])([\w.]+\.(?:py|md|toml))\b", README))
    assert {"scripts/quickstart.sh", "scripts/test.sh", "train_gpt.py", "export.py"} <= named
    made_by_users = {"data/datasets", "data/tokenizers"}
    for name in named:
        known = any((folder / name).exists() for folder in (ROOT, ROOT / "scripts", ROOT / "data", ROOT / "logs"))
        assert known or name.startswith(("logs/", *made_by_users)), name


def test_no_placeholder_is_left():
    assert "@@" not in README
