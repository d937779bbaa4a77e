"""Guarantees of scripts/remote_run.sh: whatever breaks, a verified copy of every result is here before more is paid for.

    bash scripts/test.sh tests/test_remote.py

The host is a real sshd on loopback that this file starts as the current user; cuts are kills of its processes, the death of
a machine is a SIGKILL to all that hold the job's lock. The trainer is mostly a small stand-in that REMOTE_PYTHON names: it
keeps train_gpt.py's contract of files, checkpoints, signals and exit codes, its weights are a hash chain over the steps, and
it waits at a step until the test says go on. One test runs the real trainer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyData, tiny_knobs

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8

STAND_IN = f"""#!{sys.executable} -IS
import hashlib, json, os, signal, sys, time
from pathlib import Path

knob, stopped = os.environ.get, []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
folder = Path(knob("LOG_DIR")) / knob("RUN_ID")
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)


def log(line):
    print(line, flush=True)
    with (folder / "train.log").open("a") as file:
        file.write(line + "\\n")


def replace(name, data):
    (folder / (name + ".tmp")).write_bytes(data)
    os.replace(folder / (name + ".tmp"), folder / name)


step, weights, steps = 0, knob("SEED", "1337").encode(), int(knob("ITERATIONS", "{STEPS}"))
found = sorted((folder / "checkpoints").glob("step_*.safetensors"))
if found:
    step, weights = int(found[-1].stem[5:]), found[-1].read_bytes()
log(f"from step:{{step}} {{' '.join(sys.argv[1:])}}")
(folder / "config.json").write_text(json.dumps(dict(os.environ), indent=1))
while step < steps:
    step += 1
    weights = hashlib.sha256(weights + b"%d" % step).digest()
    log(f"step:{{step}}/{{steps}}")
    gate = Path(knob("DATA_PATH", "/") + "_%d" % step)      # recipes take knobs of the trainer alone: these two are lent
    while f"{{step}}" in knob("TOKENIZER_PATH", "").split(",") and not gate.exists() and not stopped:
        time.sleep(0.02)
    every = int(knob("CHECKPOINT_EVERY", "0"))
    if stopped or every and step % every == 0:
        replace(f"checkpoints/step_{{step:08d}}.safetensors", weights)
    if stopped:
        log("stopped by signal 15")
        sys.exit(143)
code = int(knob("EXIT", "0"))
if code in (0, 3):
    replace("final_model.int8.ptz", weights * int(knob("BLOCKS", "64")))
    replace("summary.json", json.dumps({{"under_cap": code == 0}}).encode())
sys.exit(1 if "torch.distributed.run" in sys.argv else code)
"""


def artifact(seed: int = 1337, blocks: int = 64) -> bytes:
    """What the stand-in makes of a seed when nothing disturbs it."""
    weights = str(seed).encode()
    for step in range(1, STEPS + 1):
        weights = hashlib.sha256(weights + b"%d" % step).digest()
    return weights * blocks


def wait_for(condition: Callable[[], Any], what: str, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        assert process is None or process.poll() is None, f"ended before {what}"
        time.sleep(0.02)


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return found


class Host:
    """sshd on a port of its own, and REMOTE_DIR."""

    def __init__(self, folder: Path):
        self.folder, self.remote = folder, folder / "host" / "trainer"
        self.remote.parent.mkdir(parents=True)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "sshd_config").write_text("\n".join((
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host_key", f"PidFile {folder}/sshd.pid",
            f"AuthorizedKeysFile {folder}/user_key.pub", "StrictModes no", "UsePAM no", "PermitRootLogin yes",
            "MaxStartups 100", "KexAlgorithms curve25519-sha256",
            f"SetEnv OMP_NUM_THREADS=1 SEED=666 HOME={folder} PATH={os.environ['PATH']}", "")))   # HOME: no login files
        self.ssh_opts = (f"-F none -p {self.port} -i {folder}/user_key -o StrictHostKeyChecking=accept-new"
                         f" -o UserKnownHostsFile={folder}/known_hosts")
        self.listen()

    def listen(self) -> None:
        log = (self.folder / "sshd.log").open("a")
        self.sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", self.folder / "sshd_config"], stderr=log)
        wait_for(lambda: self.reachable, "sshd", None)

    @property
    def reachable(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            return connection.recv(3) == b"SSH"
        return False

    def cut(self) -> None:
        """Ends the listener and every connection; jobs are detached and live on."""
        tree, doomed = parents(), {self.sshd.pid}
        names = {pid: Path(f"/proc/{pid}/comm") for pid in tree}
        for _ in range(3):      # listener, privileged and unprivileged process of each connection
            for pid, parent in tree.items():
                with contextlib.suppress(OSError):
                    if parent in doomed and names[pid].read_text().startswith("sshd"):
                        doomed.add(pid)
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.sshd.wait()

    def job_pids(self) -> list[int]:
        """All processes that hold the job's lock: the job, the trainer and its children."""
        lock, found = str(self.remote / "logs" / ".job.lock"), []
        for fd in Path("/proc").glob("[0-9]*/fd/9"):
            with contextlib.suppress(OSError):
                found += [int(fd.parts[2])] if os.readlink(fd) == lock else []
        return found

    def die(self) -> None:
        """What a machine's end does to the job."""
        while pids := self.job_pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def run(self, run_id: str) -> Path:
        return self.remote / "logs" / run_id

    def starts(self, run_id: str) -> int:
        return (self.run(run_id) / "remote" / "launch.txt").read_text().count("start: ")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    missing = [name for name in ("ssh", "ssh-keygen", "rsync", "flock", "setsid") if not shutil.which(name)]
    missing += [] if os.access("/usr/sbin/sshd", os.X_OK) else ["sshd"]
    if missing or not Path("/proc/self/fd").exists():
        pytest.skip(f"needs {', '.join(missing) or '/proc'}")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)      # sshd's privilege separation directory
    host = Host(tmp_path_factory.mktemp("sshd"))
    answer = subprocess.run(["ssh", *host.ssh_opts.split(), "127.0.0.1", "true"], capture_output=True, text=True)
    if answer.returncode:
        host.cut()
        pytest.skip(f"this user cannot log in at the sshd started here: {answer.stderr.strip()}")
    yield host
    host.cut()


@pytest.fixture
def host(server: Host, tmp_path: Path) -> Iterator[Host]:
    server.remote = tmp_path / "host" / "trainer"
    server.remote.parent.mkdir()
    yield server
    server.die()
    if not server.reachable:
        server.listen()


class Desk:
    """The local side: recipes, logs and what remote_run.sh prints."""

    def __init__(self, folder: Path, host: Host):
        self.folder, self.host, self.logs, self.gate = folder, host, folder / "logs", folder / "gate"
        self.python = folder / "stand_in"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.recipe("short", ITERATIONS=STEPS, CHECKPOINT_EVERY=2)
        self.recipe("long", ITERATIONS=STEPS, CHECKPOINT_EVERY=2, DATA_PATH=self.gate, TOKENIZER_PATH=5)
        self.settings = {
            "SSH_OPTS": host.ssh_opts, "REMOTE_DIR": str(host.remote), "REMOTE_PYTHON": str(self.python), "PULL_EVERY": "1",
            "LOG_DIR": str(self.logs), "VENV": str(folder / "no_venv")}
        self.count, self.started = 0, list[subprocess.Popen[str]]()

    def recipe(self, name: str, **knobs: object) -> None:
        (self.folder / f"{name}.env").write_text("# a comment\n\n" + "".join(f"{k}={v}\n" for k, v in knobs.items()))

    def start(self, *words: object, at: str = "127.0.0.1", options: dict[str, Any] | None = None,
              **settings: Any) -> subprocess.Popen[str]:
        flags = [str(word) for word in words if str(word).startswith("--")]
        rest = [str(word) for word in words if not str(word).startswith("--")]
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.count += 1
        self.started.append(subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "remote_run.sh"), *flags, at, *rest], cwd=self.folder, start_new_session=True,
            env=kept | self.settings | {k: str(v) for k, v in settings.items()}, text=True,
            stdout=self.out.open("a"), stderr=subprocess.STDOUT, **options or {}))
        return self.started[-1]

    @property
    def out(self) -> Path:
        """What the newest command printed."""
        return self.folder / f"terminal_{self.count}"

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.out.read_text()

    def ends(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        process.wait(60)
        return process.returncode, self.out.read_text()

    def call(self, *words: object, **settings: Any) -> tuple[int, str]:
        return self.ends(self.start(*words, **settings))

    def refused(self, *words: object, **settings: Any) -> tuple[int, str]:
        """Exit code and last line of a command that must leave no run behind, neither here nor there."""
        code, out = self.call(*words, **settings)
        assert not list(self.host.remote.glob("logs/*/remote/job.log"))
        lines = [line for line in out.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, out
        return code, lines[0]

    def open(self, step: int = 5) -> None:
        self.gate.with_name(f"gate_{step}").touch()

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL to the command and all that it started here."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, run_id: str) -> Path:
        return self.logs / run_id

    def only_run(self) -> str:
        found = [path.name for path in self.logs.iterdir()]
        assert len(found) == 1, found
        return found[0]

    def check(self, run_id: str, data: bytes | None = None) -> None:
        """Every result on the host is here, bit for bit, and the artifact is the undisturbed one."""
        mine, theirs = self.run(run_id), self.host.run(run_id)
        local = {"remote/record"} | {str(p.relative_to(mine)) for p in (mine / "remote" / "code").rglob("*")}
        there = {str(p.relative_to(theirs)) for p in theirs.rglob("*") if p.is_file()}
        newest = sorted(name for name in there if name.startswith("checkpoints/"))[-1:]
        there = {name for name in there if not name.startswith("checkpoints/") or name in newest}
        assert {str(p.relative_to(mine)) for p in mine.rglob("*") if p.is_file()} - local == there
        for name in there:
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
        lines = (mine / "remote" / "manifest").read_text().splitlines()
        listed = {name: digest for digest, name in (line.split("  ./") for line in lines)}
        assert listed.keys() == there - {"remote/manifest", "remote/push.log"}
        for name, digest in listed.items():
            assert hashlib.sha256((mine / name).read_bytes()).hexdigest() == digest, name
        assert (mine / "final_model.int8.ptz").read_bytes() == (data or artifact())


@pytest.fixture
def desk(tmp_path: Path, host: Host) -> Iterator[Desk]:
    desk = Desk(tmp_path, host)
    yield desk
    for process in desk.started:        # a command that was left alone tries for ever
        if process.poll() is None:
            desk.kill(process)


# --- a run that nothing disturbs ----------------------------------------------------------------------------------------


def test_a_run_arrives_complete_and_verified(desk: Desk, host: Host) -> None:
    budget = {"MAX_COST_USD": 1, "USD_PER_HOUR": 20, "EXPECTED_SECONDS": 60, "OVERHEAD_SECONDS": 30}
    code, out = desk.call("short.env", "BLOCKS=9", SEED="7", ITERATIONS="1", **budget)
    assert code == 0, out
    run_id = desk.only_run()
    assert run_id.startswith("short_20")
    desk.check(run_id, artifact(blocks=9))      # SEED of neither the terminal nor the host reached the job
    assert f"{run_id}: BLOCKS=9 CHECKPOINT_EVERY=2 ITERATIONS=8 LOG_DIR=logs RESUME=auto RUN_ID={run_id} \n" in out
    assert "step:8/8\n" in out
    assert out.endswith(f"remote: {run_id} complete: 9 files verified in {desk.run(run_id)}\n")
    assert f"{run_id} costs up to 0.50 USD (60 + 30 s at 20 an hour); 0.00 of 1.00 are spent\n" in out
    bill = (desk.run(run_id) / "remote" / "record").read_text().split("bill=")[1].split("\n")[0].split()
    assert (bill[0], bill[3]) == ("0.0000", "20")
    assert 0 <= int(bill[2]) - int(bill[1]) < 120
    given = json.loads((desk.run(run_id) / "config.json").read_text())
    knobs = {"BLOCKS": "9", "CHECKPOINT_EVERY": "2", "ITERATIONS": "8", "LOG_DIR": "logs", "RESUME": "auto",
             "RUN_ID": run_id}
    assert {name: given.get(name) for name in knobs} == knobs
    assert "SEED" not in given
    assert not [name for name in given.keys() - knobs if not name.startswith(("OMP_", "LC_", "CUDA_", "LD_"))
                and name not in ("PATH", "HOME", "USER", "LANG", "TMPDIR")]
    assert {p.name for p in host.remote.iterdir()} == {
        "train_gpt.py", "export.py", "requirements.txt", "scripts", "data", "logs"}
    assert {p.name for p in (host.remote / "data").iterdir()} == {"prepare.py"}


def test_dry_run_contacts_nobody_and_leaves_nothing(desk: Desk) -> None:
    code, out = desk.ends(desk.start("short.env", "SEED=3", "RUN_ID=one", at="nobody@no-such-host.invalid", DRY_RUN=1))
    assert code == 0
    assert "one: CHECKPOINT_EVERY=2 ITERATIONS=8 LOG_DIR=logs RESUME=auto RUN_ID=one SEED=3" in out
    assert f"would start there, detached: {desk.python} train_gpt.py" in out
    assert not desk.logs.exists()


def test_runs_of_one_recipe_get_names_of_their_own(desk: Desk) -> None:
    code, out = desk.call("short.env", "SEED=1", "short.env", "SEED=2", "short.env", "SEED=2", DRY_RUN=1)
    names = [line.split()[1] for line in out.splitlines() if " SEED=" in line]
    assert (code, len(set(names))) == (0, 3), out


def test_a_run_over_the_cap_arrives_and_says_so(desk: Desk) -> None:
    code, out = desk.call("short.env", "RUN_ID=one", "EXIT=3", NPROC=2)       # torchrun itself ends with 1
    line = f"one complete, OVER THE CAP (exit 3), not a valid submission: 9 files verified in {desk.run('one')}\n"
    assert (code, line in out) == (0, True), out
    assert "from step:0 -m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py\n" in out
    desk.check("one")


def test_a_failed_run_arrives_and_ends_the_command(desk: Desk, host: Host) -> None:
    code, out = desk.call("short.env", "RUN_ID=one", "EXIT=1", "short.env", "RUN_ID=two")
    assert (code, "error: one failed on 127.0.0.1 with exit 1: 7 files verified in " in out) == (1, True), out
    assert (desk.run("one") / "train.log").read_bytes() == (host.run("one") / "train.log").read_bytes()
    assert not host.run("two").exists()


# --- what breaks ----------------------------------------------------------------------------------------------------------


def begin(desk: Desk, *words: object, **settings: Any) -> subprocess.Popen[str]:
    """The recipe `long`, begun and waiting in its fifth step, its checkpoint of the fourth and its log copied."""
    process = desk.start("long.env", "RUN_ID=one", *words, **settings)
    wait_for(desk.says("step:5/8"), "the fifth step", process)
    wait_for((desk.run("one") / "checkpoints" / "step_00000004.safetensors").exists, "the checkpoint", process)
    return process


def completes(desk: Desk, process: subprocess.Popen[str], starts: int, run_id: str = "one") -> str:
    desk.open()
    code, out = desk.ends(process)
    assert code == 0, out
    desk.check(run_id)
    assert desk.host.starts(run_id) == starts
    return out


def test_a_cut_connection_is_waited_for(desk: Desk, host: Host) -> None:
    process = begin(desk)
    host.cut()
    wait_for(desk.says("trying again every 1 s"), "the message", process)
    host.listen()
    out = completes(desk, process, starts=1)
    assert "remote: going on\n" in out
    assert out.count("step:5/8") == 1       # the log is streamed on from where it broke off


def test_a_killed_command_given_again_attends_the_same_job(desk: Desk) -> None:
    process = desk.start("long.env")
    wait_for(desk.says("step:5/8"), "the fifth step", process)
    desk.kill(process)
    run_id = desk.only_run()        # named by the clock, found again by the knobs
    process = desk.start("long.env")
    wait_for(desk.says(f"{run_id} is running on 127.0.0.1: attending it"), "the job", process)
    out = completes(desk, process, starts=1, run_id=run_id)
    assert "step:6/8" in out
    assert desk.only_run() == run_id


def test_a_job_that_died_with_its_machine_goes_on_from_its_checkpoint(desk: Desk, host: Host) -> None:
    process = begin(desk)
    host.die()
    out = completes(desk, process, starts=2)
    assert "the job of one died with its machine; its newest checkpoint there: step_00000004.safetensors" in out
    assert out.count("from step:4 ") == 1


def test_a_fresh_machine_gets_the_checkpoint_of_the_copy(desk: Desk, host: Host) -> None:
    process = begin(desk)
    host.die()
    shutil.rmtree(host.remote)
    out = completes(desk, process, starts=2)
    assert "127.0.0.1 has nothing of one: starting it from the copy here" in out
    assert out.count("from step:4 ") == 1


def test_a_run_moves_to_another_host_only_when_the_old_one_has_let_go(desk: Desk, host: Host) -> None:
    desk.kill(begin(desk))
    other = host.remote.with_name("other")
    code, out = desk.ends(desk.start("long.env", "RUN_ID=one", at="localhost", REMOTE_DIR=other))
    assert (code, "error: one is still on 127.0.0.1 (running): give the command with that host" in out) == (4, True), out
    host.die()
    shutil.rmtree(desk.run("one") / "checkpoints")      # only the old machine has it
    process = desk.start("long.env", "RUN_ID=one", at="localhost", REMOTE_DIR=other)
    host.remote = other
    assert "from step:4 " in completes(desk, process, starts=2)


def test_a_job_that_dies_twice_without_progress_is_not_paid_a_third_time(desk: Desk, host: Host) -> None:
    process = desk.start("long.env", "RUN_ID=one", "CHECKPOINT_EVERY=0")
    for starts in (1, 2):
        wait_for(lambda: desk.out.read_text().count("step:5/8") == starts, "the fifth step", process)  # noqa: B023
        host.die()
    code, out = desk.ends(process)
    assert (code, out.splitlines()[-1]) == (
        1, "error: one died twice without getting past checkpoint -; set CHECKPOINT_EVERY"), out
    assert host.starts("one") == 2


def test_a_stopped_job_leaves_checkpoint_manifest_and_a_last_push(desk: Desk, host: Host, tmp_path: Path) -> None:
    (tmp_path / "pushed").mkdir()
    process = begin(desk, PUSH_TO=tmp_path / "pushed")
    pid = int((host.remote / "logs" / ".job.lock").read_text().split()[1])
    os.kill(pid, signal.SIGTERM)
    code, out = desk.ends(process)
    assert (code, "error: one was stopped on 127.0.0.1 by a signal: 7 files verified" in out) == (8, True), out
    wait_for((tmp_path / "pushed" / "one" / "remote" / "manifest").exists, "the push")
    for folder in (desk.run("one"), tmp_path / "pushed" / "one"):
        assert " ./checkpoints/step_00000005.safetensors\n" in (folder / "remote" / "manifest").read_text()
        check = subprocess.run(["sha256sum", "-c", "--quiet", "remote/manifest"], cwd=folder, capture_output=True, text=True)
        assert check.returncode == 0, check
    process = desk.start("long.env", "RUN_ID=one")
    wait_for(desk.says("one was stopped before: going on from step_00000005.safetensors"), "the start", process)
    assert "from step:5 " in completes(desk, process, starts=2)


def test_a_full_disk_loses_nothing_and_is_waited_for(desk: Desk) -> None:
    """The receiver's files may not grow past 256 KiB, which needs no privilege: EFBIG stands in for ENOSPC."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))

    blocks = 20_000     # 640,000 bytes
    process = desk.start("short.env", "RUN_ID=one", f"BLOCKS={blocks}",
                         options={"preexec_fn": limit, "restore_signals": False})   # SIGXFSZ stays ignored
    wait_for(desk.says(f"cannot write to {desk.run('one')} ("), "the message", process)
    assert "nothing is lost on 127.0.0.1, free some space; trying again every 1 s" in desk.out.read_text()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    code, out = desk.ends(process)
    assert code == 0, out
    desk.check("one", artifact(blocks=blocks))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk takes root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_really_full_disk_is_waited_for(desk: Desk, small_disk: Path) -> None:
    desk.logs = small_disk / "logs"
    desk.settings["LOG_DIR"] = str(desk.logs)
    code, line = desk.refused("long.env", "RUN_ID=one")
    assert (code, line.startswith(f"error: LOG_DIR={desk.logs} has 3"), "kB free, a run needs at least 65536" in line) == (
        7, True, True)
    subprocess.run(["mount", "-o", "remount,size=80m", small_disk], check=True)
    blocks = 20_000
    process = begin(desk, f"BLOCKS={blocks}")
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    desk.open()
    wait_for(desk.says(f"cannot write to {desk.run('one')} (0 kB free)"), "the message", process)
    filler.unlink()
    code, out = desk.ends(process)
    assert code == 0, out
    desk.check("one", artifact(blocks=blocks))


def flip(path: Path) -> None:
    """Damage that neither size nor time shows."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_damaged_files_are_found_by_their_hash_and_pulled_again(desk: Desk) -> None:
    process = begin(desk)
    flip(desk.run("one") / "config.json")
    out = completes(desk, process, starts=1)
    assert "the copy differs from the host's manifest: config.json; pulling again" in out
    flip(desk.run("one") / "final_model.int8.ptz")
    (desk.run("one") / "summary.json").unlink()
    code, out = desk.call("long.env", "RUN_ID=one")
    line = "remote: one was complete, but its copy is damaged: final_model.int8.ptz summary.json\n"
    assert (code, line in out) == (0, True), out
    desk.check("one")
    desk.host.cut()
    code, out = desk.call("long.env", "RUN_ID=one")     # what is whole here needs no host
    assert (code, "one was complete before; RUN_ID=other after the recipe runs it again" in out) == (0, True), out
    assert desk.host.starts("one") == 1


# --- what is not started --------------------------------------------------------------------------------------------------


def test_nothing_starts_before_the_run_ahead_is_safe(desk: Desk, host: Host) -> None:
    desk.kill(begin(desk))
    code, out = desk.call("--require-pull", "short.env", "RUN_ID=two")      # a new call
    assert (code, "error: one was started on 127.0.0.1 and is not safe here yet: give its command" in out) == (5, True), out
    code, out = desk.call("short.env", "RUN_ID=two")
    assert (code, "error: 127.0.0.1 is busy with one in " in out) == (4, True), out
    assert not host.run("two").exists()
    process = desk.start("--require-pull", "long.env", "RUN_ID=one", "short.env", "RUN_ID=two")     # one call
    wait_for(desk.says("attending it"), "the first run", process)
    assert not host.run("two").exists()
    out = completes(desk, process, starts=1)
    assert 0 < out.index("remote: one complete: ") < out.index("remote: two runs on ") < out.index("remote: two complete: ")
    desk.check("two")


@pytest.mark.parametrize(("knobs", "price", "message"), [
    (("MAX_WALLCLOCK_SECONDS=600",), 20, "two refused: up to 6.67 USD (600 + 600 s at 20 an hour); 4.50 of 11.00 are spent"),
    (("MAX_WALLCLOCK_SECONDS=0",), 2, "two has no MAX_WALLCLOCK_SECONDS: with MAX_COST_USD give EXPECTED_SECONDS"),
])
def test_a_run_over_the_budget_is_not_started(desk: Desk, knobs: tuple[str, ...], price: float, message: str) -> None:
    record = desk.run("one") / "remote" / "record"
    record.parent.mkdir(parents=True)
    record.write_text("status=complete\nbill=2.5 1700000000 1700000360 20\n")      # 2.50 USD and a tenth of an hour at 20
    code, line = desk.refused("short.env", "RUN_ID=two", *knobs, MAX_COST_USD=11, USD_PER_HOUR=price)
    assert (code, message in line) == (6, True), line


@pytest.mark.parametrize(("words", "settings", "message"), [
    ((), {}, "usage: bash scripts/remote_run.sh [--require-pull] HOST RECIPE"),
    (("SEED=1",), {}, "usage: "),
    (("none",), {}, "recipe none: no such file, and none of scripts/recipes/"),
    (("broken.env",), {}, "broken.env: wanted KNOB=value, each knob once, no blanks around it, got: SEED 1"),
    (("short.env", "LOG_DIR=x"), {}, "short.env: LOG_DIR is no knob of a remote run"),
    (("short.env", "PULL_EVERY=5"), {}, "PULL_EVERY is no knob of a remote run; settings of remote_run.sh go before"),
    (("short.env", "RUN_ID=a/b"), {}, "RUN_ID must be a name of letters, digits and ._-, got 'a/b'"),
    (("short.env", "RUN_ID=a", "long.env", "RUN_ID=a"), {}, "long.env: RUN_ID=a occurs twice; give each run its own"),
    (("short.env", "RUN_ID=mine"), {}, "mine exists and was not started by remote_run.sh; choose another RUN_ID"),
    (("short.env",), {"PULL_EVERY": "0"}, "PULL_EVERY must be at least 1, got '0'"),
    (("short.env",), {"NPROC": "eight"}, "NPROC must be a whole number, got 'eight'"),
    (("short.env",), {"USD_PER_HOUR": "1,5"}, "USD_PER_HOUR must be a number, got '1,5'"),
    (("short.env",), {"MAX_COST_USD": "5"}, "MAX_COST_USD needs USD_PER_HOUR"),
    (("short.env",), {"REMOTE_DIR": "a b"}, "REMOTE_DIR must be a path of letters, digits and ._/-, got 'a b'"),
    (("short.env", "ITERATION=1"), {"VENV": sys.prefix}, "ITERATION is not a knob of this version, did you mean ITERATIONS"),
])
def test_a_wrong_command_is_refused_in_one_line(
    desk: Desk, words: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    (desk.folder / "broken.env").write_text("SEED 1\n")
    (desk.run("mine")).mkdir(parents=True)
    code, out = desk.ends(desk.start(*words, at="no-such-host.invalid", **settings))
    assert (code, message in out) == (2, True), out
    assert [p.name for p in desk.logs.iterdir()] == ["mine"]


def test_a_run_that_would_not_fit_this_disk_is_refused(desk: Desk) -> None:
    code, line = desk.refused("short.env", "MODEL_DIM=262144", "NUM_HEADS=2048", "CAP_POLICY=warn", VENV=sys.prefix)
    assert (code, "bytes free, checkpoints and artifact may need" in line) == (7, True), line
    assert not desk.logs.exists()


def test_an_unreachable_host_is_one_line(desk: Desk) -> None:
    code, line = desk.refused("short.env", SSH_OPTS="-F none -p 1")
    assert (code, line.startswith("error: 127.0.0.1 cannot be used: ssh: connect to host ")) == (4, True), line
    assert not desk.logs.exists()


def test_other_knobs_under_the_same_run_id_are_refused(desk: Desk) -> None:
    assert desk.call("short.env", "RUN_ID=one")[0] == 0
    code, out = desk.call("short.env", "RUN_ID=one", "SEED=2")
    assert (code, "error: RUN_ID=one was started with other knobs" in out) == (2, True), out
    desk.logs.rename(desk.logs.with_name("elsewhere"))      # a colleague's folder, so to say
    code, out = desk.call("short.env", "RUN_ID=one", "SEED=2")
    assert (code, "error: RUN_ID=one exists on 127.0.0.1 with other knobs" in out) == (2, True), out
    assert desk.call("short.env", "RUN_ID=one")[0] == 0     # the same knobs: a copy for the colleague
    desk.check("one")


# --- the real trainer -----------------------------------------------------------------------------------------------------


def test_the_trainer_killed_with_its_machine_ends_bit_equal(
    desk: Desk, host: Host, tiny_data: TinyData, tmp_path: Path
) -> None:
    knobs = tiny_knobs(tiny_data, tmp_path / "here") | {"ITERATIONS": "24", "CHECKPOINT_EVERY": "2", "RUN_ID": "tiny"}
    desk.recipe("real", **{name: value for name, value in knobs.items() if name != "LOG_DIR"})
    process = desk.start("real.env", REMOTE_PYTHON=sys.executable)
    wait_for(lambda: list((host.run("tiny") / "checkpoints").glob("step_*.safetensors")), "a checkpoint", process)
    host.die()
    assert train_gpt.main(knobs) == 0       # the same, undisturbed, meanwhile
    code, out = desk.ends(process)
    assert code == 0, out
    assert (out.count("died with its machine"), out.count("\nresumed: step:")) == (1, 1)
    mine, theirs = desk.run("tiny"), tmp_path / "here" / "logs" / "tiny"
    assert (mine / "final_model.int8.ptz").read_bytes() == (theirs / "final_model.int8.ptz").read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (mine, theirs)]
    for stage in ("pre_roundtrip", "roundtrip"):
        assert summaries[0][stage]["val_loss"] == summaries[1][stage]["val_loss"]
