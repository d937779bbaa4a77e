#!/usr/bin/env bash
# The host's side of scripts/remote_run.sh, which sends this file over ssh: bash -s -- VERB DIR RUN_ID ... < remote_job.sh
#
#   status                                    prints STATE CODE MANIFEST ENV CHECKPOINT, "-" where there is none (see below)
#   start NPROC PYTHON PUSH_TO                starts the job, detached, unless one runs in DIR
#   follow OFFSET SECONDS                     prints the job's log from that byte on, for so long or until the job ends
#   job NPROC PYTHON PUSH_TO                  the job: the trainer to its end, then the manifest, then the push
#   train NPROC PYTHON                        becomes the trainer
#
# DIR/logs/RUN_ID/remote/ holds env (the job's knobs), launch.txt (each start: machine, command, environment), job.log (all
# that the trainer prints), exit_code and, last of all, manifest: the SHA-256 of every result. STATE is running, ended (there
# is a manifest), died (started, and neither), absent, or busy (DIR's job is another run, CODE names it). CODE is the exit
# code, MANIFEST and ENV are the SHA-256 of those files, CHECKPOINT is the newest one's name. DIR/logs/.job.lock is held by
# the job and all its processes; it reads RUN_ID PID, and SIGTERM to that PID stops the run with a checkpoint.
# Nothing here deletes a result.
set -euo pipefail

digest() { if [ -e "$1" ]; then sha256sum < "$1" | cut -d' ' -f1; else echo -; fi }

newest_checkpoint() {
    local found
    found=$(find "$folder/checkpoints" -name 'step_*.safetensors' 2>/dev/null | sort | tail -n 1)
    basename "${found:--}"
}

status() {
    local state=absent code=- tool holder
    for tool in rsync flock setsid sha256sum; do
        command -v "$tool" > /dev/null || { echo "it lacks $tool (Debian: apt-get install rsync util-linux)" >&2; exit 1; }
    done
    exec 8>>"$lock"
    if ! flock -s -n 8; then
        read -r holder _ < "$lock"
        if [ "$holder" = "$run_id" ]; then state=running; else state=busy code=$holder; fi
    elif [ -e "$remote/manifest" ]; then
        state=ended code=$(cat "$remote/exit_code")
    elif [ -e "$remote/job.log" ]; then
        state=died
    fi
    echo "$state $code $(digest "$remote/manifest") $(digest "$remote/env") $(newest_checkpoint)"
}

start() {  # start NPROC PYTHON PUSH_TO
    exec 9>>"$lock"
    flock -w 5 9 || { echo "another job runs in $PWD" >&2; exit 1; }
    echo "$run_id" > "$lock"
    # A manifest belongs to an earlier stop from which the run now goes on; an exit code without one to a job that died
    # between its end and its manifest, which is then all that is left to do.
    [ ! -e "$remote/manifest" ] || rm -f "$remote/manifest" "$remote/exit_code"
    setsid bash scripts/remote_job.sh job . "$run_id" "$@" < /dev/null >> "$remote/job.log" 2>&1 &
}

follow() {  # follow OFFSET SECONDS
    local holder pid
    read -r holder pid < "$lock"
    [ "$holder" = "$run_id" ] && [ -n "$pid" ] || return
    timeout "$2" tail -s 0.2 -c "+$1" --pid="$pid" -f "$remote/job.log" || [ $? -eq 124 ]
}

job() {  # job NPROC PYTHON PUSH_TO
    echo "$run_id $$" > "$lock"
    if [ ! -e "$remote/exit_code" ]; then
        run_trainer "$1" "$2"
        echo "job: exit $code"
        echo "$code" > "$remote/exit_code.tmp"
        publish "$remote/exit_code"
    fi
    list_results > "$remote/manifest.tmp"
    publish "$remote/manifest"
    # Beside what comes next, for whoever pulls need not wait; its words have a file of their own, the manifest vouches
    # for the log.
    [ -z "$3" ] || { rsync -rt --partial-dir=.rsync-partial --delay-updates "$folder/" "$3/$run_id/" ||
        echo "the push to $3 failed"; } > "$remote/push.log" 2>&1 9>&- &
}

run_trainer() {  # run_trainer NPROC PYTHON: leaves its exit code in $code
    local pid="" stopped=""
    trap 'stopped=1; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true' TERM
    # A process group of its own: of a SIGTERM to the whole job it would get two, and the second ends it without a checkpoint.
    setsid bash scripts/remote_job.sh train . "$run_id" "$@" &
    pid=$!
    [ -z "$stopped" ] || kill -TERM "$pid" 2>/dev/null || true
    while :; do     # a trapped signal ends `wait`, not the trainer
        code=0
        wait "$pid" || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    # torchrun ends with 1 whatever the code of the rank that ended first; summary.json is written last and says it.
    if [ "$code" -eq 1 ] && [ -e "$folder/summary.json" ]; then
        code=0
        ! grep -q '"under_cap": false' "$folder/summary.json" || code=3
    elif [ -n "$stopped" ] && [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then
        code=143
    fi
}

train() {  # train NPROC PYTHON
    local nproc=$1 python=$2 name knobs kept=()
    if [ -z "$python" ]; then
        # shellcheck source=scripts/lib.sh
        . scripts/lib.sh
        ensure_venv requirements.txt
        python=$VENV/bin/python
    fi
    [ "$nproc" -gt 0 ] || nproc=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    local command=("$python" train_gpt.py)
    [ "$nproc" -le 1 ] || command=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$nproc" train_gpt.py)
    mapfile -t knobs < "$remote/env"
    for name in $(compgen -e); do       # what a machine needs; a knob in the host's environment is none of the run's
        case $name in
            PATH | HOME | USER | LANG | TMPDIR | LD_LIBRARY_PATH | CUDA_* | NCCL_* | OMP_* | PYTORCH_* | TORCH*)
                kept+=("$name=${!name}") ;;
        esac
    done
    {
        echo "start: $(date -u +%Y-%m-%dT%H:%M:%SZ) on $(hostname), $(uname -sr), checkpoint $(newest_checkpoint)"
        nvidia-smi -L 2>/dev/null || echo "no GPU"
        printf 'environment: %s\n' "${kept[@]}"
        echo "command: ${command[*]}"
    } >> "$remote/launch.txt"
    exec env -i "${kept[@]}" "${knobs[@]}" "${command[@]}"
}

list_results() {  # every file of the run but half-written ones and the older checkpoints, as sha256sum prints and checks
    local newest
    newest=$(newest_checkpoint)
    (
        cd "$folder"
        find . -type f ! -name '*.tmp' ! -path '*/.rsync-partial/*' ! -path ./remote/manifest ! -path ./remote/push.log \
            \( ! -path './checkpoints/*' -o -name "$newest" \) -print0 | sort -z | xargs -0 sha256sum
    )
}

publish() {  # publish FILE: FILE.tmp is whole and becomes FILE
    sync "$1.tmp"
    mv "$1.tmp" "$1"
}

main() {
    mkdir -p "$2/logs"
    cd "$2"
    run_id=$3 folder=logs/$3 remote=logs/$3/remote lock=logs/.job.lock
    case $1 in
        status) status ;;
        start) start "${@:4}" ;;
        follow) follow "${@:4}" ;;
        job) job "${@:4}" ;;
        train) train "${@:4}" ;;
    esac
}

main "$@"
exit    # nothing after this line is read, though the file may come through a pipe
