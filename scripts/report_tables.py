"""The numbers of a report as rows (SQLite), as tables (terminal, Markdown, page), and the words around them."""
from __future__ import annotations

import json
import sqlite3
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import paired
from arms import Arm, Entry, Study, change_text, value_text
from paired import ALPHA, MOST_SEEDS, POWER
from report_page import Cell, Table

WIDTH = 120             # columns of the terminal's tables

# ----------------------------------------------------------------------------------------------------------------------
# Rows: the numbers behind every table, by plain names.
# ----------------------------------------------------------------------------------------------------------------------


SCHEMA = {
    "runs": "run_id TEXT, arm TEXT, seed INTEGER, state TEXT, note TEXT, folder TEXT, val_bpb REAL, val_loss REAL,"
            " before_val_bpb REAL, gap_bpb REAL, artifact_bytes INTEGER, code_bytes INTEGER, total_bytes INTEGER,"
            " cap_bytes INTEGER, over_cap INTEGER, step INTEGER, train_s REAL, scored_tokens INTEGER, scored_bytes INTEGER,"
            " configuration TEXT, timed INTEGER, device TEXT, torch TEXT, knobs TEXT, parts TEXT",
    "arms": "arm TEXT, rank INTEGER, is_control INTEGER, n INTEGER, wanted_seeds INTEGER, over_cap_runs INTEGER,"
            " val_bpb_mean REAL, val_bpb_sd REAL, gap_bpb_mean REAL, gap_bpb_sd REAL, artifact_bytes_mean REAL,"
            " artifact_bytes_sd REAL, total_bytes_mean REAL, total_bytes_sd REAL, configurations TEXT, differs_in TEXT",
    "comparisons": "arm TEXT, control TEXT, verdict TEXT, pairs INTEGER, difference_bpb REAL, low_bpb REAL, high_bpb REAL,"
                   " p_paired REAL, p_holm REAL, p_welch REAL, detectable_bpb REAL, seeds_needed INTEGER,"
                   " smallest_effect_bpb REAL",
    "flags": "kind TEXT, text TEXT",
}       # knobs and parts are JSON; the rows below have these columns


def as_rows(study: Study) -> dict[str, list[Mapping[str, Any]]]:
    """The tables of the SQLite file; the same numbers fill every other table."""
    return {"runs": [run_row(entry) for entry in study.entries],
            "arms": [arm_row(study, rank, arm) for rank, arm in enumerate(study.arms, 1)],
            "comparisons": [comparison_row(study, name, found) for name, found in study.comparisons.items()],
            "flags": [{"kind": flag.kind, "text": flag.text} for flag in study.flags]}


def run_row(entry: Entry) -> dict[str, Any]:
    run, summary = entry.run, entry.summary if entry.run else {}
    before, after = summary.get("pre_roundtrip", {}), (run and run.score) or {}
    return {"run_id": entry.run_id, "arm": entry.arm, "seed": entry.seed, "state": entry.state, "note": entry.note,
            "folder": str(entry.folder), "val_bpb": entry.val_bpb, "val_loss": after.get("val_loss"),
            "before_val_bpb": before.get("val_bpb"), "gap_bpb": entry.gap_bpb,
            **{key: summary.get(key) for key in ("artifact_bytes", "code_bytes", "total_bytes")},
            "cap_bytes": entry.cap_bytes, "over_cap": entry.over_cap,
            "step": summary.get("step"), "train_s": summary.get("seconds", {}).get("train"),
            "scored_tokens": after.get("tokens"), "scored_bytes": after.get("bytes"),
            "configuration": run and run.configuration, "timed": run and run.timed,
            "device": run and run.config.get("device"), "torch": run and run.config.get("torch"),
            "knobs": run and json.dumps(run.knobs, sort_keys=True),
            "parts": run and json.dumps(summary["parts"], sort_keys=True)}


def arm_row(study: Study, rank: int, arm: Arm) -> dict[str, Any]:
    row: dict[str, Any] = {"rank": rank if arm.n else None, "arm": arm.name, "is_control": arm is study.control, "n": arm.n,
                           "wanted_seeds": len(study.wanted_seeds(arm))}
    spreads = {"val_bpb": arm.mean_sd(lambda entry: entry.val_bpb), "gap_bpb": arm.mean_sd(lambda entry: entry.gap_bpb),
               **{key: arm.of_summary(key) for key in ("artifact_bytes", "total_bytes")}}
    for key, (mean, sd) in spreads.items():
        row |= {f"{key}_mean": mean, f"{key}_sd": sd}
    return row | {"over_cap_runs": sum(entry.over_cap for entry in arm.scored),
                  "configurations": ", ".join(dict.fromkeys(run.configuration for run in arm.runs)),
                  "differs_in": change_text(study.changes(arm))}


def comparison_row(study: Study, name: str, found: paired.Comparison) -> dict[str, Any]:
    assert study.control is not None
    return {"arm": name, "control": study.control.name, "verdict": found.verdict, "pairs": found.pairs,
            "difference_bpb": found.difference, "low_bpb": found.low, "high_bpb": found.high, "p_paired": found.p_paired,
            "p_holm": found.p_holm, "p_welch": found.p_welch, "detectable_bpb": found.detectable,
            "seeds_needed": found.seeds_needed, "smallest_effect_bpb": study.smallest_effect}


def sqlite_bytes(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A SQLite file of these tables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            for name, schema in SCHEMA.items():
                columns = [column.split()[0] for column in schema.split(",")]
                connection.execute(f"CREATE TABLE {name} ({schema})")
                places = ", ".join(f":{column}" for column in columns)
                connection.executemany(f"INSERT INTO {name} VALUES ({places})", rows[name])
            connection.commit()
        return path.read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Tables: what the terminal, the Markdown and the page show alike.
# ----------------------------------------------------------------------------------------------------------------------


def cell(value: float | None, form: str) -> Cell:
    """A number, or a dash."""
    return Cell("-") if value is None else Cell(format(value, form), float(value))


def p_cell(p: float | None) -> Cell:
    return Cell("<0.0001", p) if p is not None and p < 1e-4 else cell(p, ".4f")


def table(name: str, title: str, main: str, words: Iterable[str], rows: Iterable[Mapping[str, Cell]]) -> Table:
    """Columns are the keys of the rows; all but `words` are numbers."""
    held = list(rows)
    heads = tuple(held[0]) if held else (main,)
    return Table(name, title, heads, tuple(tuple(row[head] for head in heads) for row in held),
                 frozenset(heads) - {main, *words}, main)


def needed_cell(found: paired.Comparison) -> Cell:
    too_many = found.seeds_needed is not None and found.seeds_needed > MOST_SEEDS
    return Cell(f">{MOST_SEEDS}", float(MOST_SEEDS + 1)) if too_many else cell(found.seeds_needed, "d")


def verdict_table(study: Study) -> Table:
    assert study.control is not None
    return table("verdict-table", f"Against {study.control.name}", "arm", ("verdict",), ({
        "arm": Cell(name), "verdict": Cell(found.verdict), "pairs": cell(found.pairs, "d"),
        "difference": cell(found.difference, "+.5f"),
        "95 % interval": Cell("-") if found.low is None else Cell(f"{found.low:+.5f} to {found.high:+.5f}", found.low),
        "Holm p": p_cell(found.p_holm), "p": p_cell(found.p_paired), "Welch p": p_cell(found.p_welch),
        "MDD": cell(found.detectable, ".5f"), "needs n": needed_cell(found),
    } for name, found in study.comparisons.items()))


def arm_title(study: Study, arm: Arm) -> str:
    over = sum(entry.over_cap for entry in arm.scored)
    return arm.name + " (control)" * (arm is study.control) + f" (over the cap: {over} of {len(arm.scored)})" * bool(over)


def arm_table(study: Study) -> Table:
    def row(rank: int, arm: Arm) -> dict[str, Cell]:
        bpb, gap = arm.mean_sd(lambda entry: entry.val_bpb), arm.mean_sd(lambda entry: entry.gap_bpb)
        artifact, total = arm.of_summary("artifact_bytes"), arm.of_summary("total_bytes")
        return {"rank": cell(rank if arm.n else None, "d"), "arm": Cell(arm_title(study, arm)),
                "n": Cell(f"{arm.n} of {len(study.wanted_seeds(arm))}", float(arm.n)),
                "val_bpb": cell(bpb[0], ".5f"), "sd": cell(bpb[1], ".5f"), "round trip": cell(gap[0], "+.5f"),
                "artifact": cell(artifact[0], ",.0f"), "sd (bytes)": cell(artifact[1], ",.0f"),
                "total": cell(total[0], ",.0f")}

    return table("arm-table", "Arms, best first", "arm", (), (row(rank, arm) for rank, arm in enumerate(study.arms, 1)))


def change_table(study: Study) -> Table:
    """What differs from the reference, a row a knob."""
    reference = study.reference.name if study.reference else "-"
    return table("change-table", f"Knobs that differ from {reference}", "arm", ("knob", "here", f"in {reference}"), (
        {"arm": Cell(arm.name), "knob": Cell(name), "here": Cell(value_text(here)),
         f"in {reference}": Cell(value_text(there))}
        for arm in study.arms for name, there, here in study.changes(arm)))


def run_table(study: Study) -> Table:
    def row(entry: Entry) -> dict[str, Cell]:
        found = run_row(entry)
        return {"run": Cell(entry.run_id), "arm": Cell(entry.arm), "seed": cell(entry.seed, "d"), "state": Cell(entry.state),
                "val_bpb": cell(entry.val_bpb, ".5f"), "before": cell(found["before_val_bpb"], ".5f"),
                "round trip": cell(entry.gap_bpb, "+.5f"), "artifact": cell(found["artifact_bytes"], ",d"),
                "total": cell(found["total_bytes"], ",d"), "steps": cell(found["step"], ",d"),
                "train s": cell(found["train_s"], ",.1f"), "configuration": Cell(found["configuration"] or "-"),
                "note": Cell(entry.note or "-")}

    return table("run-table", "All runs", "run", ("arm", "state", "configuration", "note"), map(row, study.entries))


def tables(study: Study) -> list[Table]:
    found = [verdict_table(study)] if study.comparisons else []
    return [*found, arm_table(study), *([changed] if (changed := change_table(study)).rows else [])]


def headline(study: Study) -> str:
    """The verdicts in one sentence."""
    if study.control is None:
        return f"{len(study.arms)} arms, no control named (--control ARM): nothing is compared."
    verdicts = Counter(found.verdict for found in study.comparisons.values())
    counts = (f"{verdicts[word]} {word}" for word in paired.VERDICTS if verdicts[word])
    return f"Against {study.control.name}: {', '.join(counts) or 'no other arm'}."


def facts(study: Study) -> str:
    scored = sum(len(arm.scored) for arm in study.arms)
    return (f"{len(study.arms)} arms, {scored} of {len(study.entries)} runs with a score,"
            f" seeds {', '.join(map(str, sorted({entry.seed for entry in study.entries})))}")


def legend(study: Study) -> list[tuple[str, str]]:
    """How the numbers came about."""
    least = f"{study.smallest_effect:g} bpb"
    way = f", by the evaluation {' or else '.join(study.scored_by)} where there is one" if study.scored_by else ""
    return [
        ("val_bpb", f"Bits per byte of the validation text, of the artifact read back from its file{way}; mean and standard"
                    " deviation over seeds; lower is better. Repeats of a seed count once, by their mean."),
        ("verdict", f"better or worse: Holm p is below {ALPHA:g}, by the sign of the difference. no effect: not so, and"
                    f" the interval lies inside -{least} to +{least}, the smallest effect that matters (--smallest-effect);"
                    " identical pairs are no effect. underpowered: neither, or fewer than two pairs."),
        ("difference", "Arm minus control over the seeds that both have, in bpb, with Student's 95 % interval."),
        ("p", "Paired t test, two-sided. Holm p is adjusted for the number of arms compared and decides; Welch p is of"
              " the two means without pairing and decides nothing."),
        ("MDD", f"Minimum detectable difference: what so many pairs of this spread find with probability {POWER:g} at alpha"
                f" {ALPHA:g}, two-sided, by the noncentral t distribution, not the normal approximation."),
        ("needs n", f"Pairs that would find {least} with probability {POWER:g}, at alpha {ALPHA:g} divided by the number of"
                    f" arms compared, if the spread stays; looked for up to {MOST_SEEDS:,}."),
        ("round trip", "val_bpb of the artifact minus val_bpb of the float weights."),
        ("bytes", "artifact: the file; total: with the packed code, held against the cap. Means over seeds."),
        ("configuration", "Hash of all that decides the result but the seed: knobs, code, tokenizer, size of the data."),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Terminal and Markdown.
# ----------------------------------------------------------------------------------------------------------------------


def clipped(text: str, width: int) -> str:
    """Its two ends where it is too long: names of one sweep often begin alike."""
    keep = max(width - 1, 2)
    return text if len(text) <= width else f"{text[:keep - keep // 2]}…{text[-(keep // 2):]}"


def terminal_table(found: Table) -> Iterator[str]:
    """Lines of at most WIDTH columns: text gives way, numbers do not."""
    widths = [max(map(len, (head, *(row[i].text for row in found.rows)))) for i, head in enumerate(found.heads)]
    words = [i for i, head in enumerate(found.heads) if head not in found.numeric]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[max(words, key=lambda i: widths[i])] -= 1
    yield found.title
    for row in (tuple(map(Cell, found.heads)), *found.rows):
        texts = (clipped(held.text, width) for held, width in zip(row, widths, strict=True))
        yield "  ".join(f"{text:>{width}}" if head in found.numeric else f"{text:<{width}}"
                        for text, width, head in zip(texts, widths, found.heads, strict=True)).rstrip()
    yield ""


def terminal_lines(study: Study) -> Iterator[str]:
    for flag in study.flags:
        yield from textwrap.wrap(f"! {flag.kind}: {flag.text}", WIDTH, subsequent_indent="    ")
    yield from [""] * bool(study.flags)
    yield from (headline(study), facts(study), "")
    for found in tables(study):
        yield from terminal_table(found)
    for term, text in legend(study)[:6]:
        yield from textwrap.wrap(f"{term}: {text}", WIDTH, subsequent_indent="    ")


def markdown_text(text: str) -> str:
    """Names from outside as they are, whatever Markdown or HTML they hold."""
    for mark in "\\`*[]|":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown(study: Study, title: str) -> str:
    lines = [f"# {markdown_text(title)}", ""]
    lines += [f"- **{flag.kind}**: {markdown_text(flag.text)}" for flag in study.flags] + [""] * bool(study.flags)
    lines += [markdown_text(headline(study)), "", markdown_text(facts(study)), ""]
    for found in [*tables(study), run_table(study)]:
        lines += [f"## {markdown_text(found.title)}", "", f"| {' | '.join(map(markdown_text, found.heads))} |"]
        lines.append("|" + "".join("---:|" if head in found.numeric else "---|" for head in found.heads))
        lines += [f"| {' | '.join(markdown_text(held.text) for held in row)} |" for row in found.rows] + [""]
    lines += ["## How it was computed", "", *(f"- **{term}**: {markdown_text(text)}" for term, text in legend(study))]
    return "\n".join(lines) + "\n"
