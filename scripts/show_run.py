"""Prints what a run left behind: val_bpb before and after the round trip, bytes against the cap, seconds, where things are.

    python scripts/show_run.py logs/RUN_ID

Two reference lines come from the data's manifest when it has them: the order-0 entropy of the validation text's bytes and
a bigram model of the tokens fitted on the training split. A model that has learned is well under both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def lines(summary: dict[str, Any], config: dict[str, Any], reference: dict[str, float], folder: Path) -> list[str]:
    """The report, one string a line."""
    before, after = summary["pre_roundtrip"], summary["roundtrip"]
    rows = [("val_bpb before the round trip", f"{before['val_bpb']:.4f}")]
    if after:
        rows.append(("val_bpb of the artifact", f"{after['val_bpb']:.4f}"))
    rows += [(f"  reference: {name}", f"{value:.4f}") for name, value in (
        ("bigram token model", reference.get("bigram_bits_per_byte")),
        ("order-0 bytes", reference.get("order0_bits_per_byte")),
    ) if value is not None]
    cap = summary["cap_bytes"]
    rows += [
        ("artifact", f"{summary['artifact_bytes']:,} bytes, {summary['bits_per_weight']:.2f} bits a weight"),
        ("packed code", f"{summary['code_bytes']:,} bytes"),
        ("total", f"{summary['total_bytes']:,} bytes of "
         + (f"{cap:,} ({summary['total_bytes'] / cap:.1%})" if cap else "no cap")),
        ("parameters", f"{summary['params']:,}, {summary['step']} steps, {summary['train_tokens_seen']:,} tokens seen"),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary["seconds"].items())),
        ("device", config["device"]),
        ("outputs", f"{folder}/ ({', '.join(sorted(p.name for p in folder.iterdir() if p.is_file()))})"),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "summary.json").is_file():
        print("usage: python scripts/show_run.py logs/RUN_ID (a finished run: it has a summary.json)", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    summary, config = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("summary.json", "config.json"))
    manifest = Path(config["knobs"]["data_path"]) / "manifest.json"
    reference = json.loads(manifest.read_text(encoding="utf-8")).get("reference", {}) if manifest.is_file() else {}
    print("\n".join(lines(summary, config, reference, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
