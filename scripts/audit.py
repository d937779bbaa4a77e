"""Proves on an artifact and the very code that scores it that a score is legal. Exit code 0: every rule holds, 1: one is
broken, 2: wrong input.

    python scripts/audit.py final_model.int8.ptz --data DIR --tokenizer MODEL           # the plain score
    python scripts/audit.py final_model.int8.ptz --data DIR --tokenizer MODEL EVAL_STRIDE=64 -o report.json

Rules, for the plain windows and for each mode that the knobs ask for:

    causality         Tokens after a cut are changed: no score up to it moves. Cuts lie before and behind the edges of
                      windows, batches, documents and chunks of adaptation; also on two ranks. With documents where they
                      were scores are the same bits; with others or none they are put into other batches, so within
                      rounding. Where isolation is claimed, tokens before a document are changed: no score in it moves.
    normalisation     Distributions that modes give out sum to 1 and are what the score was made with. Whatever they give
                      out, the scores of all tokens of the vocabulary in one target's place sum to 1; of a mode that
                      adapts, which takes its time each time, some of them against its distribution.
    order             A mode that computes gradients gives a trace: scores first, learns after, digests of the state in
                      between. A second call gives the same bits and the weights are the artifact's after all.
    bytes             Those of each document of the split are those of the text that its tokens decode to; their sum is
                      the known one where it is the challenge's split.
    once              One finite loss a target, no target twice in a pass or in the windows; sums as reported, and as
                      `export.py eval` prints them. The plain windows leave out what fills none, as the challenge's do.
    hygiene           No validation document stands in the training shards beside it, whole or almost whole.
    self-containment  `export.py eval` with these knobs, in a folder with nothing but validation shards, opens artifact,
                      tokenizer, these shards and the code of Python and the program; no socket, no other program.

Scores are audited on a stretch of the split with many documents and a long one (--tokens), bytes and hygiene on all of it.
The audit finds what these checks can see; it proves nothing about a program that knows that it is audited.
scripts/audit_rules.py says what a mode's module must offer.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402  (the repository's root is not on the path before)

import audit_rules as rules  # noqa: E402
import export_verbs  # noqa: E402
import hygiene  # noqa: E402
from audit_process import (  # noqa: E402
    PRINTED_TOLERANCE,
    Watched,
    check_opened,
    check_printed,
    eval_command,
    printed_results,
    run_watched,
)
from audit_rules import Event, Finding  # noqa: E402
from audit_subject import (  # noqa: E402
    PLAIN,
    PLAIN_BATCH_TOKENS,
    Seen,
    Subject,
    adapted_text,
    choose_stretch,
    probe_text,
    sample_targets,
)
from export import tool, weights_digest, write_atomically  # noqa: E402
from train_gpt import Config, DataError, Tokenizer, byte_table, progress, read_split  # noqa: E402

LEAST_TOKENS = 2048             # of the stretch
SAMPLED_TARGETS = 64            # whose distributions are asked for
PROBE_TOKENS = 64               # of the text whose last token is replaced by each of the vocabulary
PROBE_SUBSTITUTES = 24          # tokens put there when a mode adapts


@dataclass
class Verdict:
    rule: str
    findings: list[Finding]
    seconds: float

    @property
    def holds(self) -> bool:
        return not any(finding.faults for finding in self.findings)

    def lines(self) -> list[str]:
        head = f"{self.rule:17} {'holds' if self.holds else 'BROKEN':7} {self.seconds:6.1f} s  "
        texts = [text for finding in self.findings for text in (finding.line, *(f"  BROKEN: {f}" for f in finding.shown))]
        return [head + texts[0]] + [" " * len(head) + text for text in texts[1:]]


def judge(rule: str, check: Callable[[], Iterable[Finding]]) -> Verdict:
    """A rule that cannot be checked does not hold."""
    t0, findings = time.perf_counter(), list[Finding]()
    try:
        for finding in check():
            findings.append(finding)
    except Exception as fault:      # whatever an evaluator may raise on a text that it must be able to score
        text = " ".join(f"{type(fault).__name__}: {fault}".split())
        findings.append(Finding("could not be checked to its end", faults=[text]))
    return Verdict(rule, findings, time.perf_counter() - t0)


@dataclass
class Audit:
    """One subject on one stretch of text, what it gave there, and the sizes of the checks."""
    subject: Subject
    tokens: np.ndarray
    probes: int = 1
    seed: int = 1337
    seen: Seen = field(init=False)
    events: dict[str, list[Event]] = field(init=False)

    def __post_init__(self) -> None:
        self.digest = weights_digest(self.subject.model.state_dict())
        self.seen = self.subject.see(self.tokens)
        self.events = self.subject.events(self.tokens)
        self.adapts = self.seen.gradients > 0 or bool(self.events)
        self.tolerance = rules.ROUNDING_NATS[self.subject.rt.dtype]
        # Sums of gradients may come in any order on a GPU; everything else is the same work in the same shapes.
        self.exact = self.tolerance if self.adapts and self.subject.rt.device.type != "cpu" else 0.0

    @property
    def alphabet(self) -> tuple[int, int]:
        return self.subject.bos_id, self.subject.vocab_size

    def units(self) -> dict[str, np.ndarray]:
        """First targets of the parts that evaluators cut the text into."""
        ev, length = self.subject.evaluation(self.tokens), self.subject.plain_length(self.tokens)
        found = {"plain window": np.arange(1, self.tokens.size, length),
                 "document": np.flatnonzero(self.tokens == self.subject.bos_id) + 1}
        if self.subject.modules:
            found |= {"window": ev.windows[:, 1], "batch": np.array([b.windows[0, 1] for b in ev.batches(ev.windows)])}
        chunks = [event.first for events in self.events.values() for event in events if event.kind == "score"]
        return found | ({"chunk": np.array(chunks)} if chunks else {})

    def causality(self) -> Iterator[Finding]:
        subject, tokens, units = self.subject, self.tokens, self.units()
        cuts = rules.choose_cuts(units, tokens.size, self.probes, self.seed)
        yield rules.check_future(subject.evaluate, self.seen.nats, tokens, cuts, self.alphabet, self.seed, self.exact)
        inner = units["document"][(units["document"] > 2) & (units["document"] < tokens.size - 2)]
        middle = int(inner[inner.size // 2]) if inner.size else tokens.size // 2
        yield rules.check_other_ends(subject.evaluate, self.seen.nats, tokens, middle - 2, self.alphabet, self.seed,
                                     self.tolerance)
        if subject.modules:
            edges = {kind: firsts for kind, firsts in units.items() if kind in ("batch", "chunk")}
            cuts, base = rules.choose_cuts(edges, tokens.size, self.probes, self.seed), subject.evaluate_by_ranks(tokens)
            yield rules.check_future(subject.evaluate_by_ranks, base, tokens, cuts, self.alphabet, self.seed, self.exact,
                                     " on two ranks")
        if names := subject.isolated(self.seen):
            chosen = np.random.default_rng(self.seed).choice(inner - 1, min(self.probes + 1, inner.size), replace=False)
            yield rules.check_isolation(subject.evaluate, self.seen.nats, tokens, names, chosen.tolist(), self.alphabet,
                                        self.seed, self.exact)

    def normalisation(self) -> Iterator[Finding]:
        subject, seen, tokens = self.subject, self.seen, self.tokens
        targets = sample_targets(tokens, subject.bos_id, SAMPLED_TARGETS, self.seed)
        known = {name: targets[targets <= nats.size] for name, nats in seen.nats.items()}
        given = subject.distributions(seen, tokens, known[PLAIN])
        yield from rules.check_sums(given, seen.nats, tokens, known[PLAIN], self.tolerance)
        if not self.adapts:
            yield rules.check_every_token(subject.evaluate, probe_text(tokens, PROBE_TOKENS), subject.vocab_size)
            return
        text = adapted_text(tokens, (event for events in self.events.values() for event in events))
        given = subject.distributions(seen, text, np.array([text.size - 1]))
        given = {name: log_p for name, log_p in given.items() if name != PLAIN}
        yield rules.check_some_tokens(subject.evaluate, given, text, PROBE_SUBSTITUTES, self.seed, self.tolerance)

    def order(self) -> Iterator[Finding]:
        for name, events in self.events.items():
            yield rules.check_order(name, events, self.tokens.size - 1)
        gradients = Finding("calls of autograd while scoring", self.seen.gradients)
        if self.seen.gradients and not self.events:
            gradients.faults.append("gradients were computed while scoring, and no mode's module has `adapt`")
        yield gradients
        again = Finding("scores of a second call, bit for bit", tolerance=self.exact)
        rules.compare(again, self.seen.nats, self.subject.evaluate(self.tokens), slice(0, None), "the same text again")
        yield again
        weights = Finding("digests of the artifact's weights after all this", 1)
        if weights_digest(self.subject.model.state_dict()) != self.digest:
            weights.faults.append("the model's weights are not those of the artifact any more")
        yield weights

    def once(self) -> Iterator[Finding]:
        subject, seen, targets = self.subject, self.seen, self.tokens.size - 1
        length, byte_counts = subject.plain_length(self.tokens), subject.evaluation(self.tokens).bytes
        plain = targets // length * length
        arrays = Finding("scores that are finite losses, one a target", sum(nats.size for nats in seen.nats.values()))
        results = Finding("scores whose reported sums are those of their targets", len(seen.results))
        for name, nats in seen.nats.items():
            arrays.faults += rules.check_array(name, nats, plain if name == PLAIN else targets)
            result = seen.results[name]
            results.faults += ([f"{name} {result}"] if isinstance(result, str) else
                               rules.check_result(name, nats, byte_counts, result, PRINTED_TOLERANCE))
        yield arrays
        yield results
        places = sum(int(times.sum()) for times in seen.passes.values())
        passes = Finding("places scored in forward passes of windows, no target twice in one", places)
        passes.faults += [f"pass {name} scored target {int(times.argmax())} {times.max()} times"
                          for name, times in seen.passes.items() if times.max(initial=0) > 1]
        yield passes
        yield rules.check_plain_sums(subject.plain_sums, subject.rt, targets, length,
                                     max(PLAIN_BATCH_TOKENS, subject.cfg.train_seq_len))


SCORE_RULES: dict[str, Callable[[Audit], Iterator[Finding]]] = {
    "causality": Audit.causality, "normalisation": Audit.normalisation, "order": Audit.order, "once": Audit.once}


def check_hygiene(val: np.ndarray, data: str, bos_id: int, allowed: int) -> Iterator[Finding]:
    try:
        shards = read_split(data, "train")
    except DataError:
        yield Finding(f"not checked, {data} holds no training shards")
        return
    with progress(sum(shard.size for shard in shards), "hygiene", True) as bar:
        found = hygiene.find_overlap(val, shards, bos_id, told=lambda tokens: bar.update(tokens - bar.n))
    held = Finding(f"validation documents, {len(found.held)} of them ({allowed} allowed) in the {found.train_documents} of"
                   f" training, {len(found.equal)} token for token", found.documents)
    if len(found.held) > allowed:
        some = ", ".join(map(str, found.held[:5]))
        held.fault(f"{len(found.held)} validation documents stand in the training shards, such as number {some}; leave them"
                   " out there (data/prepare.py tokenize --drop-duplicates does where they are equal), or accept them:"
                   f" --allow-duplicates {len(found.held)}")
    yield held
    yield Finding(f"n-grams of {hygiene.GRAM} validation tokens, {found.grams_found} of them in training's"
                  f" {found.train_tokens} tokens, half or more of {found.half} documents", found.grams)


# ----------------------------------------------------------------------------------------------------------------------
# Command line.
# ----------------------------------------------------------------------------------------------------------------------


def open_subject(args: argparse.Namespace) -> tuple[Subject, Tokenizer, np.ndarray]:
    """What the command line names. Raises ValueError, OSError."""
    state, meta = export_verbs.read_with_meta(args.file, [])
    cfg = export_verbs.mode_knobs(export_verbs.named_values(args.knobs), meta)
    cfg = cfg or replace(Config(), train_seq_len=int(meta["train_seq_len"]))
    rt, model, tok = export_verbs.open_model(state, meta, args.tokenizer, args.device, cfg.eval_seq_len)
    val = export_verbs.paired_validation(args.data, tok, meta)
    modules = {name: tool(name) for name in dict.fromkeys(cfg.modes.values())}
    return Subject(model, rt, byte_table(tok, rt.device), tok.bos_id, cfg, modules), tok, val


def longest_window(cfg: Config) -> int:
    return max(cfg.eval_seq_len, cfg.train_seq_len)


def unknown_names(knobs: Iterable[str]) -> list[str]:
    known = export_verbs.NAMED["eval"]
    return [f"{knob.partition('=')[0]} is no knob of an evaluation; those are {', '.join(sorted(known))}"
            for knob in knobs if knob.partition("=")[0] not in known]


def audit_all(args: argparse.Namespace, subject: Subject, tok: Tokenizer, val: np.ndarray) -> Iterator[Verdict]:
    """Every rule, in the order of the table."""
    size = min(args.tokens or max(LEAST_TOKENS, 8 * longest_window(subject.cfg)), val.size)
    begin, end = choose_stretch(val, subject.bos_id, size)
    tokens = np.array(val[begin:end])
    documents = int(np.count_nonzero(tokens == subject.bos_id))
    print(f"audit of {args.file}: {subject.rt.describe()} scores of {', '.join(['plain', *subject.cfg.modes]).lower()}")
    print(f"scores are audited on tokens {begin} .. {end - 1} of {val.size}, {documents} documents, seed {args.seed}",
          flush=True)
    watched: list[Watched] = []

    def contained() -> Iterator[Finding]:
        paths = sorted(Path(args.data).glob("fineweb_val_*.bin"))
        arguments = ["--device", args.device, "--max-tokens", str(size - 1), *args.knobs]
        with tempfile.TemporaryDirectory(prefix="audit_") as name:
            folder = Path(name).resolve()
            watched.append(run_watched(eval_command(args.file, paths, args.tokenizer, arguments, folder), folder))
            yield from check_opened(watched[0], [args.file, args.tokenizer, *paths])

    containment = judge("self-containment", contained)
    audit = Audit(subject, tokens, args.probes, args.seed)

    def once() -> Iterator[Finding]:
        yield from audit.once()
        if subject.modules:
            yield rules.check_windows(subject.evaluation(val).windows, val.size)
        first, out = np.array(val[:size]), "".join(one.out for one in watched)
        yield check_printed(printed_results(out), subject.evaluate(first), subject.evaluation(first).bytes)

    yield judge("causality", audit.causality)
    yield judge("normalisation", audit.normalisation)
    yield judge("order", audit.order)
    yield judge("bytes", lambda: rules.check_bytes(lambda text: subject.evaluation(text).bytes, val, tok))
    yield judge("once", once)
    yield judge("hygiene", lambda: check_hygiene(val, args.data, subject.bos_id, args.allow_duplicates))
    yield containment


def whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)
    return read


def command_line() -> argparse.ArgumentParser:
    parser = export_verbs.OneLineParser(prog="audit.py", description="Proves a score legal.")
    parser.add_argument("file")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE", help="of the evaluation, as for export.py eval")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=whole_number(0), default=0,
                        help=f"of the stretch whose scores are audited; 0 = eight windows, at least {LEAST_TOKENS}")
    parser.add_argument("--probes", type=whole_number(1), default=1, help="edges of each kind that cuts are made at")
    parser.add_argument("--seed", type=whole_number(0), default=1337)
    parser.add_argument("--allow-duplicates", type=whole_number(0), default=0, metavar="N",
                        help="validation documents that may stand in the training shards; web text has some by nature")
    parser.add_argument("-o", "--output", type=export_verbs.output_path, metavar="report.json")
    return parser


def main(arguments: list[str]) -> int:
    parser = command_line()
    args = parser.parse_intermixed_args(arguments)
    try:
        if faults := unknown_names(args.knobs):
            raise ValueError("; ".join(faults))
        subject, tok, val = open_subject(args)
    except (ValueError, OSError) as fault:
        return parser.error(" ".join(str(fault).split()))
    if 0 < args.tokens <= longest_window(subject.cfg):
        return parser.error(f"--tokens must be 0 or above a window's {longest_window(subject.cfg)}, got {args.tokens}")
    verdicts: list[Verdict] = []
    for verdict in audit_all(args, subject, tok, val):
        verdicts.append(verdict)
        print(*verdict.lines(), sep="\n", flush=True)
    broken = [verdict.rule for verdict in verdicts if not verdict.holds]
    print(f"audit: {'every rule holds' if not broken else 'BROKEN: ' + ', '.join(broken)}")
    if args.output:
        report = {"file": args.file, "knobs": args.knobs, "data": args.data, "device": subject.rt.describe(),
                  "seed": args.seed, "holds": not broken, "rules": [asdict(v) | {"holds": v.holds} for v in verdicts]}
        write_atomically(args.output, (json.dumps(report, indent=1) + "\n").encode())
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
