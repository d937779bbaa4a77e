"""Runs a sweep: every arm of a specification with every seed, one process a run, on the GPUs or cores of this machine.

    python scripts/sweep.py scripts/specs/shapes.toml                   # again after a kill: it goes on where it was
    python scripts/sweep.py SPEC ITERATIONS=200 --dry-run               # knobs behind the file go into every arm
    python scripts/sweep.py SPEC --gpus 0,1,2,3                         # or --slots 4 on CPU
    python scripts/sweep.py --iso-bytes 16000000 --scheme rd --toml SPEC        # proposes shapes of equal size, as a SPEC
    python scripts/report.py logs/sweep_NAME.json --html report.html    # what came out

scripts/sweep_spec.py describes the file. A run is identified by the hash of its resolved configuration, seed, code and
data; its folder is LOG_DIR/ARM_sSEED_HASH. So finished runs are skipped, in later sweeps too, and a change of the code runs
anew. A run that crashed starts again from its last checkpoint (RESUME=auto), `retries` times; what happened stands in its
sweep.json and in the ledger LOG_DIR/sweep_NAME.json, which is rewritten at every change. SIGINT and SIGTERM stop the runs,
which write a checkpoint first. When this program is killed outright its runs go on; the next call waits for them.

With [stop], a run under way is stopped ("halted") as soon as its val_bpb at a rung is not among the best `keep` of all runs
of its seed that got there, unless it is the control. With share_training, the first run of each training keeps its last
checkpoint and the others go on from it: the same weights, another export or evaluation.

Exit codes: 0 all runs finished or were halted, 1 some failed, 2 a wrong specification (nothing started), 130/143 stopped.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import runs  # noqa: E402  (the repository's root is not on the path before)
from export_verbs import OneLineParser  # noqa: E402
from sweep_spec import Planned, Spec, SpecError, check_log_folder, plan, read_spec, write_object  # noqa: E402
from train_gpt import Config, Runtime, caught_signals  # noqa: E402

TRAINER = ROOT / "train_gpt.py"
DONE = ("finished", "over_cap", "halted", "failed")     # states that a run does not leave by itself
POLL_S = 0.5


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


@dataclass
class Process:
    """A run under way: `child` is None where an earlier call of this program started it."""
    run: Planned
    slot: str
    pid: int | None         # None: that call ended before it could note it
    child: subprocess.Popen[bytes] | None
    halted: str = ""

    def ended(self) -> bool:
        if self.child is not None:
            return self.child.poll() is not None
        descriptor = runs.lock(self.run.folder)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def stop(self) -> None:
        """Asks the run to write a checkpoint and end."""
        if self.pid is not None and not self.ended():
            os.kill(self.pid, signal.SIGTERM)


@dataclass
class Sweep:
    """The runs of a specification and where each stands; all that must survive lies in their folders."""
    spec: Spec
    planned: list[Planned]
    slots: list[str]                                        # GPU indices, or names of CPU slots
    on_gpu: bool
    say: Callable[[str], None]
    active: dict[Path, Process] = field(default_factory=dict)

    @property
    def ledger(self) -> Path:
        return Path(self.planned[0].cfg.log_dir) / f"sweep_{self.spec.name}.json"

    # What the files say.

    def record(self, run: Planned) -> dict[str, Any]:
        path = run.folder / "sweep.json"
        return runs.read_object(path) if path.is_file() else {
            "sweep": self.spec.name, "arm": run.arm, "seed": run.seed, "code": run.code, "identity": run.identity,
            "training": run.training, "knobs": run.knobs, "halted": "", "attempts": []}

    def state(self, run: Planned) -> tuple[str, str]:
        """(state, note): finished, over_cap, halted, failed, running or pending."""
        if run.folder in self.active:
            return "running", ""
        record = self.record(run)
        crashes = [a["exit_code"] for a in record["attempts"] if a["exit_code"] not in (None, 0, 3, -2, -15, 130, 143)]
        crashed = f"crashed {len(crashes)} times (exit {', '.join(map(str, crashes))})" if crashes else ""
        if (run.folder / "summary.json").is_file():
            under_cap = runs.read_object(run.folder / "summary.json").get("under_cap", True)
            return "finished" if under_cap else "over_cap", crashed
        if record["halted"]:
            return "halted", record["halted"]
        if len(crashes) > self.spec.retries:
            return "failed", f"{crashed}; see {run.folder / 'sweep.out'}"
        return "pending", crashed

    def write_ledger(self) -> None:
        states = [(run, *self.state(run)) for run in self.planned]
        write_object(self.ledger, {
            "sweep": self.spec.name, "spec": str(self.spec.path), "track": self.spec.track, "control": self.spec.control,
            "score": list(self.spec.score),
            "runs": [{"run_id": run.folder.name, "arm": run.arm, "seed": run.seed, "state": state,
                      "folder": os.path.relpath(run.folder, self.ledger.parent), "note": note}
                     for run, state, note in states]})

    # Starting and ending runs.

    def leader(self, run: Planned) -> Path | None:
        """The checkpoint that this run may go on from instead of training; None where it trains itself."""
        if not self.spec.share_training:
            return None
        name = f"step_{run.cfg.iterations:08d}.safetensors"
        return next((path for other in self.relatives(run)
                     if other != run.folder and (path := other / "checkpoints" / name).is_file()), None)

    def relatives(self, run: Planned) -> list[Path]:
        """Folders of runs with the same training, in this sweep or any other of the log folder."""
        found = [other.folder for other in self.planned if other.training == run.training]
        for path in sorted(run.folder.parent.glob(f"*_s{run.seed}_*/sweep.json")):
            if path.parent not in found and runs.read_object(path).get("training") == run.training:
                found.append(path.parent)
        return found

    def waits(self, run: Planned) -> bool:
        """A run of the same training is under way, whose checkpoint will save this one its own."""
        return (self.spec.share_training and self.leader(run) is None
                and any(folder in self.active for folder in self.relatives(run) if folder != run.folder))

    def environment(self, run: Planned, slot: str) -> dict[str, str]:
        """Of the run's process: its knobs, and one GPU or its threads. Knobs of ours come from nowhere else."""
        names = {f.name.upper() for f in fields(Config)} | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
        env = {name: value for name, value in os.environ.items() if name not in names} | run.knobs
        env |= {"RUN_ID": run.folder.name, "LOG_DIR": str(run.folder.parent), "RESUME": "auto"}
        checkpoint = self.leader(run)
        if checkpoint is not None:
            env["RESUME"] = str(checkpoint)
        elif self.spec.share_training and not run.cfg.checkpoint_every:
            env["CHECKPOINT_EVERY"] = str(run.cfg.iterations)
        return env | ({"CUDA_VISIBLE_DEVICES": slot} if self.on_gpu else {"OMP_NUM_THREADS": str(self.spec.threads)})

    def start(self, run: Planned, slot: str) -> None:
        """Starts the run's process, or takes over the one that an earlier call left running."""
        run.folder.mkdir(parents=True, exist_ok=True)
        descriptor, record = runs.lock(run.folder), self.record(run)
        if descriptor is None:
            last = record["attempts"][-1]
            self.active[run.folder] = Process(run, last["slot"], last["pid"], None)
            self.say(f"{run.label}: still running from an earlier call, waiting for it")
            return
        env, path = self.environment(run, slot), run.folder / "sweep.json"
        for earlier in record["attempts"]:
            earlier["ended"] = earlier["ended"] or "unknown"        # killed together with the call that started it
        attempt = {"started": now(), "ended": None, "exit_code": None, "slot": slot, "pid": None, "from": env["RESUME"]}
        record["attempts"].append(attempt)
        write_object(path, record)
        with (run.folder / "sweep.out").open("ab") as out:
            # In a session of its own: a Ctrl-C reaches this program alone, which then ends the runs in good order.
            child = subprocess.Popen([sys.executable, str(TRAINER)], env=env, stdin=subprocess.DEVNULL,
                                     stdout=out, stderr=subprocess.STDOUT, pass_fds=[descriptor], start_new_session=True)
        os.close(descriptor)                # the process holds the lock now
        attempt["pid"] = child.pid
        write_object(path, record)
        self.active[run.folder] = Process(run, slot, child.pid, child)
        source = "" if env["RESUME"] == "auto" else ", trained already"
        again = f", attempt {len(record['attempts'])}" if len(record["attempts"]) > 1 else ""
        self.say(f"{run.label}: started on {'GPU ' if self.on_gpu else ''}{slot}{source}{again}")

    def end(self, process: Process) -> None:
        """Notes how a run ended."""
        run, record = process.run, self.record(process.run)
        code = process.child.returncode if process.child is not None else None
        if record["attempts"]:
            record["attempts"][-1] |= {"ended": now(), "exit_code": code}
        record["halted"] = process.halted
        write_object(run.folder / "sweep.json", record)
        del self.active[run.folder]
        state, note = self.state(run)
        self.say(f"{run.label}: {state}{outcome(run.folder, self.spec.score)}{': ' + note if note else ''}")

    def halt_hopeless(self) -> None:
        """Ends running runs that are behind at a rung."""
        stop = self.spec.stop
        for process in self.active.values() if stop else ():
            assert stop is not None
            losses = val_bpb_by_step(process.run.folder)
            for rung in stop.rungs:
                if rung not in losses or process.halted:
                    continue
                rivals = sorted(there[rung] for other in self.planned if other.seed == process.run.seed
                                and rung in (there := val_bpb_by_step(other.folder)))
                place = 1 + sum(loss < losses[rung] for loss in rivals)
                if (len(rivals) >= stop.at_least and place > math.ceil(stop.keep * len(rivals))
                        and process.run.arm != self.spec.control):
                    process.halted = f"step {rung}: val_bpb {losses[rung]:.4f} is number {place} of {len(rivals)}"
                    process.stop()

    # The loop.

    def step(self) -> bool:
        """Ends what has ended and starts what can start; False when nothing is left to do."""
        changed = False
        for process in [p for p in self.active.values() if p.ended()]:
            self.end(process)
            changed = True
        self.halt_hopeless()
        for run in self.planned:
            free = [slot for slot in self.slots if slot not in {p.slot for p in self.active.values()}]
            if not free:
                break
            if self.state(run)[0] == "pending" and not self.waits(run):
                self.start(run, free[0])
                changed = True
        if changed:
            self.write_ledger()
        return bool(self.active)

    def terminate(self) -> None:
        """Stops all runs and waits for their checkpoints."""
        for process in self.active.values():
            process.stop()
        while waiting := list(self.active.values()):
            time.sleep(POLL_S)
            for process in waiting:
                if process.ended():
                    self.end(process)
        self.write_ledger()


def val_bpb_by_step(folder: Path) -> dict[int, float]:
    return {row["step"]: row["val_bpb"] for row in runs.read_metrics(folder, "val")}


def final_bpb(run: runs.Run, scored_by: tuple[str, ...]) -> float:
    """The score of a finished run, of its float weights where its artifact was not evaluated."""
    assert run.summary is not None
    return (replace(run, scored_by=scored_by).score or run.summary["pre_roundtrip"])["val_bpb"]


def outcome(folder: Path, scored_by: tuple[str, ...]) -> str:
    """What a finished run came to, for one line."""
    if not (folder / "summary.json").is_file():
        return ""
    run = runs.read_run(folder)
    assert run.summary is not None
    return (f" val_bpb:{final_bpb(run, scored_by):.5f} bytes:{run.summary['total_bytes']:,}"
            f" train:{run.summary['seconds']['train']:.0f}s")


class Screen:
    """Events as lines, and on a terminal a table of where all runs stand below them."""

    def __init__(self, out: TextIO):
        self.out, self.live, self.drawn = out, out.isatty(), 0

    def say(self, line: str) -> None:
        self.draw([])
        print(f"{now()[11:]} {line}", file=self.out, flush=True)

    def draw(self, lines: Sequence[str]) -> None:
        """Replaces the table."""
        if not self.live:
            return
        size = shutil.get_terminal_size()
        lines = [line[:size.columns - 1] for line in lines[:size.lines - 2]]
        up = f"\x1b[{self.drawn}A" if self.drawn else ""
        self.out.write(up + "\r\x1b[J" + "".join(line + "\n" for line in lines))
        self.out.flush()
        self.drawn = len(lines)


def table(sweep: Sweep) -> list[str]:
    """Where the runs stand: counts, those under way, and each arm's results so far, the best first."""
    states = {run.folder: sweep.state(run)[0] for run in sweep.planned}
    counts = {state: sum(s == state for s in states.values()) for state in (*DONE, "running", "pending")}
    lines = ["", f"sweep {sweep.spec.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n)]
    for process in sweep.active.values():
        rows = runs.read_metrics(process.run.folder, "train")[-1:] or [{"step": 0, "train_loss": math.nan}]
        steps = process.run.cfg.iterations
        lines.append(f"  {rows[0]['step']:>7}/{steps} train_loss {rows[0]['train_loss']:.4f}  {process.run.label}")
    scores: dict[str, list[float]] = {}
    for run in sweep.planned:
        if states[run.folder] in ("finished", "over_cap"):
            scores.setdefault(run.arm, []).append(final_bpb(runs.read_run(run.folder), sweep.spec.score))
    ranked = sorted((sum(found) / len(found), len(found), arm) for arm, found in scores.items())
    return lines + [f"  {mean:.5f} val_bpb, n={n}  {arm}" for mean, n, arm in ranked]


def notices(sweep: Sweep) -> list[str]:
    """What a reader of the ranking must know before it starts."""
    timed = sorted({run.arm for run in sweep.planned if run.cfg.max_wallclock_seconds > 0})
    twins: dict[str, list[str]] = {}
    for run in sweep.planned:
        twins.setdefault(run.identity, []).append(run.arm)
    found = [f"warning: {len(timed)} of {len(sweep.spec.arms)} arms end by the clock (MAX_WALLCLOCK_SECONDS): their ranking"
             " mixes quality with the machine's speed at that hour; rank on fixed steps (0)"] if timed else []
    pairs = sorted({" and ".join(arms) for arms in twins.values() if len(arms) > 1})
    return found + [f"warning: arms {pair} are the same configuration; it runs once" for pair in pairs]


def plan_lines(sweep: Sweep) -> list[str]:
    common = set.intersection(*({*knobs.items()} for knobs in sweep.spec.arms.values()))
    lines = [f"sweep {sweep.spec.name}: {len(sweep.spec.arms)} arms x {len(sweep.spec.seeds)} seeds on {len(sweep.slots)}"
             f" {'GPUs' if sweep.on_gpu else f'CPU slots of {sweep.spec.threads} threads'}, ledger {sweep.ledger}",
             "all arms: " + " ".join(f"{name}={value}" for name, value in sorted(common))]
    for arm, knobs in sweep.spec.arms.items():
        mark = " (control)" if arm == sweep.spec.control else ""
        lines.append(f"{arm}{mark}: " + " ".join(f"{k}={v}" for k, v in knobs.items() if (k, v) not in common))
    return lines


def slots_for(args: argparse.Namespace, spec: Spec, kinds: set[str]) -> tuple[list[str], bool]:
    """(slots, whether they are GPUs). Raises SpecError."""
    if kinds == {"cuda"}:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        known = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        wanted = args.gpus.split(",") if args.gpus else known
        if strange := sorted(set(wanted) - set(known)):
            raise SpecError([f"--gpus: this machine has no GPU {', '.join(strange)}; it has {', '.join(known) or 'none'}"])
        if args.slots:
            raise SpecError(["--slots is for CPU; on GPUs one run goes on each (--gpus)"])
        return wanted, True
    if args.gpus:
        raise SpecError([f"--gpus: the runs compute on {' and '.join(sorted(kinds))}"])
    count = args.slots or max(1, (os.cpu_count() or 1) // spec.threads)
    return [f"slot {i}" for i in range(count)], False


def carry_out(sweep: Sweep, screen: Screen) -> int:
    """The sweep from its first run to its last; returns the exit code."""
    with caught_signals() as signals:
        while sweep.step():
            screen.draw(table(sweep))
            time.sleep(POLL_S)
            if signals:
                screen.say(f"stopping: {len(sweep.active)} runs write a checkpoint; the same command goes on from there")
                sweep.terminate()
                return 128 + signals[0]
    sweep.write_ledger()
    states = [sweep.state(run)[0] for run in sweep.planned]
    for line in table(sweep):
        screen.say(line) if line else None
    screen.say(f"report: python scripts/report.py {sweep.ledger}")
    return 1 if "failed" in states else 0


@contextlib.contextmanager
def only_one(ledger: Path) -> Any:
    """Two calls of one sweep would fill the same slots twice. Raises SpecError."""
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.with_suffix(".lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError([f"{ledger} is being written by another call of this sweep; wait for it or stop it"]) from None
        yield


def prepare(args: argparse.Namespace, env: Mapping[str, str], say: Callable[[str], None]) -> Sweep:
    """Everything that can be wrong, before any run. Raises SpecError."""
    knobs = [argument.partition("=") for argument in args.knobs]
    if faulty := [name + value for name, equals, value in knobs if not equals]:
        raise SpecError([f"{faulty[0]} is no KNOB=value"])
    spec = read_spec(args.spec, {name: value for name, _, value in knobs}, env)
    planned = plan(spec, env)
    check_log_folder(planned)
    kinds = {Runtime.from_config(run.cfg, {}).device.type for run in planned}
    slots, on_gpu = slots_for(args, spec, kinds)
    sweep = Sweep(spec, planned, slots, on_gpu, say)
    if args.retry_failed:
        for run in planned:
            if sweep.state(run)[0] == "failed":
                write_object(run.folder / "sweep.json", sweep.record(run) | {"attempts": []})
    return sweep


def main(arguments: list[str]) -> int:
    if any(argument.startswith("--iso-bytes") for argument in arguments):
        import shapes

        return shapes.main(arguments)
    parser = OneLineParser(prog="sweep.py", description="Run every arm of a sweep with every seed.")
    parser.add_argument("spec", type=Path, metavar="SPEC.toml")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value", help="for every arm, over the file's")
    parser.add_argument("--gpus", default="", metavar="0,1", help="GPUs to use, one run on each; all without")
    parser.add_argument("--slots", type=int, default=0, metavar="N", help="runs at a time on CPU; cores / threads without")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--retry-failed", action="store_true", help="give failed runs their attempts back")
    args = parser.parse_args(arguments)
    screen = Screen(sys.stdout)
    try:
        sweep = prepare(args, os.environ, screen.say)
        print("\n".join([*plan_lines(sweep), *notices(sweep)]), flush=True)
        if args.dry_run:
            for run in sweep.planned:
                print(f"{sweep.state(run)[0]:<9} {run.folder}")
            return 0
        with only_one(sweep.ledger):
            return carry_out(sweep, screen)
    except (SpecError, runs.RunError) as fault:
        print("\n".join(f"sweep.py: {line}" for line in str(fault).splitlines()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
