#!/usr/bin/env bash
# Runs recipes on a rented machine, one after the other, and ends when a verified copy of every result is here.
#
#   bash scripts/remote_run.sh [--require-pull] HOST RECIPE [KNOB=value...] [RECIPE [KNOB=value...]]...
#   SSH_OPTS="-p 40022" bash scripts/remote_run.sh --require-pull root@203.0.113.7 baseline SEED=1 baseline SEED=2
#
# RECIPE is a file of KNOB=value lines or a name of scripts/recipes/; knobs after it win. Exactly these knobs reach the job,
# and RUN_ID, LOG_DIR and RESUME=auto. The job runs detached on the host; its log streams to this terminal; every PULL_EVERY
# seconds and at the end logs/<RUN_ID> comes here, the newest checkpoint included; a run counts as done when every file of
# the manifest that the host made at its end is here with the same SHA-256. Nothing on the host is ever deleted.
#
# Whatever breaks, the same command goes on: it finds its run by the knobs (logs/<RUN_ID>/remote/env), attends the job if it
# still runs, restarts it from its newest checkpoint if it died, on that host or, with another HOST, on a fresh machine, to
# which the checkpoint is pushed from the copy here. The code is that of the run's first start (logs/<RUN_ID>/remote/code).
# A finished run is not run again; RUN_ID=other after the recipe does that. Data is prepared on the host beforehand, in
# REMOTE_DIR/data.
#
# --require-pull starts nothing while any run that was started from here is not yet safe here.
#
# Settings, from the environment:
#   SSH_OPTS            options of ssh: port, identity, config file; nothing is asked, so a new host's key needs
#                       -o StrictHostKeyChecking=accept-new
#   REMOTE_DIR          folder on the host (~/artifact-native-trainer)
#   REMOTE_PYTHON       Python on the host (empty: .venv/bin/python, made from requirements.txt when absent)
#   NPROC               processes, one a GPU (0: as many as nvidia-smi lists)
#   PULL_EVERY          seconds between pulls, and between attempts while something is in the way (60)
#   LOG_DIR             folder of the runs here (logs)
#   PUSH_TO             rsync target, an existing folder, to which the host copies a run that ends or is stopped (none)
#   MAX_COST_USD        with USD_PER_HOUR: most that all runs recorded in LOG_DIR may cost; a run that cannot be finished and
#                       pulled within it is not started
#   EXPECTED_SECONDS    training time for that sum (MAX_WALLCLOCK_SECONDS; needed where that is 0)
#   OVERHEAD_SECONDS    for set-up, warm-up, validation, export, round trip and pull (600)
#   DRY_RUN=1           prints what would run and contacts nobody
#
# Exit codes: 0 all runs are complete and verified here (one over the byte cap too, it says so); 1 a run failed, its files
# are safe here; 2 wrong command, recipe, knob or setting; 4 the host cannot be used; 5 refused, another run is not safe here
# yet; 6 refused by the budget; 7 refused, too little disk here; 8 the job was stopped by a signal, its checkpoint is safe
# here and the same command goes on; 130, 143 this side was stopped, the job goes on. After 2 and 4 to 7 nothing new has
# started. The first run that does not complete ends the command.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

SSH_OPTS=${SSH_OPTS:-} REMOTE_DIR=${REMOTE_DIR:-artifact-native-trainer} REMOTE_PYTHON=${REMOTE_PYTHON:-} NPROC=${NPROC:-0}
PULL_EVERY=${PULL_EVERY:-60} LOG_DIR=${LOG_DIR:-logs} PUSH_TO=${PUSH_TO:-} OVERHEAD_SECONDS=${OVERHEAD_SECONDS:-600}
MAX_COST_USD=${MAX_COST_USD:-} USD_PER_HOUR=${USD_PER_HOUR:-} EXPECTED_SECONDS=${EXPECTED_SECONDS:-} DRY_RUN=${DRY_RUN:-0}
REMOTE_DIR=${REMOTE_DIR#"~/"}       # ssh and rsync both start in the home folder
SAFE='^[A-Za-z0-9._/-]+$'           # names that no shell on the way reads otherwise
LEAST_FREE_KB=65536                 # four artifacts at the cap, where no Python here can say what the run needs

tell() { echo "remote: $*"; }
quit() { echo "error: ${*:2}" >&2; exit "$1"; }       # quit CODE WORD...

# ---- what is asked for ------------------------------------------------------------------------------------------------

check_settings() {
    local name
    for name in PULL_EVERY NPROC; do
        [[ ${!name} =~ ^[0-9]+$ ]] || quit 2 "$name must be a whole number, got '${!name}'"
    done
    [ "$PULL_EVERY" -ge 1 ] || quit 2 "PULL_EVERY must be at least 1, got '$PULL_EVERY'"
    for name in OVERHEAD_SECONDS MAX_COST_USD USD_PER_HOUR EXPECTED_SECONDS; do
        [[ ${!name} =~ ^([0-9]+(\.[0-9]+)?)?$ ]] || quit 2 "$name must be a number, got '${!name}'"
    done
    [ -z "$MAX_COST_USD" ] || [ -n "$USD_PER_HOUR" ] || quit 2 "MAX_COST_USD needs USD_PER_HOUR, the price of the host"
    [[ $REMOTE_DIR =~ $SAFE ]] || quit 2 "REMOTE_DIR must be a path of letters, digits and ._/-, got '$REMOTE_DIR'"
    for name in ssh rsync sha256sum; do
        command -v "$name" > /dev/null || quit 2 "this needs $name, which is not installed here"
    done
}

read_knobs() (  # read_knobs FILE KNOB=value...: one a line; a subshell, so that nothing of this environment is a knob
    file=$1 NAMES=$'\n'$(knob_names)$'\n'
    shift
    for name in $(compgen -e); do unset "$name"; done
    for knob in "$@"; do export "${knob?}"; done
    load_recipe "$file"
    for name in $(compgen -e); do echo "$name=${!name}"; done
)

knob() { sed -n "s/^$2=//p" <<< "$1"; }     # knob KNOBS NAME: its value

plan_run() {  # plan_run RECIPE KNOB=value...: appends to run_ids and knob_lists, or ends with what is wrong
    local file knobs name run_id
    find_recipe "$1"
    file=$RECIPE
    knobs=$(read_knobs "$file" "${@:2}" | LC_ALL=C sort)
    for name in LOG_DIR RESUME PULL_EVERY NPROC REMOTE_DIR REMOTE_PYTHON SSH_OPTS PUSH_TO MAX_COST_USD USD_PER_HOUR \
        EXPECTED_SECONDS OVERHEAD_SECONDS DRY_RUN; do
        ! grep -q "^$name=" <<< "$knobs" ||
            quit 2 "$1: $name is no knob of a remote run; settings of remote_run.sh go before the command"
    done
    run_id=$(knob "$knobs" RUN_ID)
    knobs=$(grep -v '^RUN_ID=' <<< "$knobs" || true)
    [ -n "$run_id" ] || run_id=$(known_run "$knobs")
    [ -n "$run_id" ] || run_id=$(new_name "$(basename "${file%.env}")_$(date +%Y%m%d_%H%M%S)")
    [[ $run_id =~ $SAFE && $run_id != */* && $run_id != .* ]] ||
        quit 2 "RUN_ID must be a name of letters, digits and ._-, got '$run_id'; give one after the recipe"
    ! planned "$run_id" || quit 2 "$1: RUN_ID=$run_id occurs twice; give each run its own"
    run_ids+=("$run_id")
    knob_lists+=("$(printf '%s\n' "$knobs" "RUN_ID=$run_id" LOG_DIR=logs RESUME=auto | sed '/^$/d' | LC_ALL=C sort)")
}

planned() { [[ " ${run_ids[*]-} " == *" $1 "* ]]; }

new_name() {  # new_name BASE: a RUN_ID that no run has
    local name=$1 count=1
    while planned "$name" || [ -e "$LOG_DIR/$name" ]; do
        count=$((count + 1))
        name=$1_$count
    done
    echo "$name"
}

known_run() {  # known_run KNOBS: the run here that was started with these, an unfinished one first
    local file found="" id
    for file in "$LOG_DIR"/*/remote/env; do
        if [ "$(grep -vE '^(RUN_ID|LOG_DIR|RESUME)=' "$file" 2> /dev/null)" != "$1" ]; then continue; fi
        id=$(basename "${file%/remote/env}")
        ! planned "$id" || continue
        [ -z "$found" ] || [ "$(recorded "$id" status)" != complete ] || continue
        found=$id
    done
    echo "$found"
}

check_run() {  # check_run KNOBS: faults that can be found here, while they cost nothing
    local python=$VENV/bin/python words base=$LOG_DIR
    if [ -f "$folder/remote/env" ]; then
        [ "$(cat "$folder/remote/env")" = "$1" ] || quit 2 "RUN_ID=$run_id was started with other knobs; choose another"
        return
    fi
    [ ! -e "$folder" ] || quit 2 "$folder exists and was not started by remote_run.sh; choose another RUN_ID"
    if [ ! -x "$python" ]; then
        tell "no $python here, so the host alone will check the knobs of $run_id"
        while [ ! -d "$base" ]; do base=$(dirname "$base"); done
        [ "$(free_kb "$base")" -ge "$LEAST_FREE_KB" ] ||
            quit 7 "LOG_DIR=$LOG_DIR has $(free_kb "$base") kB free, a run needs at least $LEAST_FREE_KB"
        return
    fi
    mapfile -t words <<< "$1"
    env -i "PATH=$PATH" "${words[@]}" "LOG_DIR=$LOG_DIR" "$python" -c '
import os, sys
from train_gpt import Config, folder_problems
cfg, problems = Config.parse(os.environ)
code, problems = (2, problems) if problems else (2, cfg.world_problems(max(1, int(sys.argv[1]))))
code, problems = (code, problems) if problems else (7, folder_problems(cfg))
print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
sys.exit(code if problems else 0)' "$NPROC" || exit $?
}

free_kb() { df -Pk "$1" | awk 'NR == 2 {print $4}'; }

# ---- the record of a run: logs/<RUN_ID>/remote/record -----------------------------------------------------------------

recorded() { sed -n "s/^$2=//p" "$LOG_DIR/$1/remote/record" 2> /dev/null || true; }     # recorded RUN_ID KEY

# status: started, stopped (ended early, safe here) or complete. host, ssh_opts, remote_dir: where. bill: USD of earlier
# starts, seconds of the newest start and of its last sign of life, USD an hour.
record() {  # record KEY VALUE; fails, and leaves the record as it was, where the disk is full
    local file=$folder/remote/record
    {
        { [ ! -e "$file" ] || sed "/^$1=/d" "$file"; } > "$file.tmp" && echo "$1=$2" >> "$file.tmp" && mv "$file.tmp" "$file"
    } 2> /dev/null
}

remember() {  # the run's folder, knobs, code and record, before anything is started for it
    [ ! -f "$folder/remote/record" ] || return 0
    if ! { mkdir -p "$folder/remote" && echo "$knobs" > "$folder/remote/env" &&
        rsync -rtR --exclude=__pycache__ train_gpt.py export.py requirements.txt scripts data/*.py "$folder/remote/code/" &&
        record status started; }; then
        quit 7 "cannot write to $folder; nothing was started"
    fi
}

record_place() {
    record host "$HOST" && record ssh_opts "$SSH_OPTS" && record remote_dir "$REMOTE_DIR"
}

bill_start() { record bill "$(spent "$run_id") $(date +%s) $(date +%s) ${USD_PER_HOUR:-0}"; }

bill_seen() {
    local before start rate
    read -r before start _ rate <<< "$(recorded "$run_id" bill)"
    [ -z "$before" ] || record bill "$before $start $(date +%s) $rate"
}

spent() {  # spent [RUN_ID]: USD of this run, without one of all runs recorded here
    local record
    for record in "$LOG_DIR"/${1:-*}/remote/record; do
        [ ! -f "$record" ] || sed -n 's/^bill=//p' "$record"
    done | awk '{usd += $1 + ($3 - $2) * $4 / 3600} END {printf "%.4f\n", usd}'
}

# ---- the host ---------------------------------------------------------------------------------------------------------

set_place() {  # set_place HOST SSH_OPTS REMOTE_DIR
    HOST=$1 SSH_OPTS=$2 REMOTE_DIR=$3
    read -r -a ssh_options <<< "$SSH_OPTS"
    # ssh takes the first value that it meets, so SSH_OPTS wins. A dead connection is noticed within 15 s.
    ssh_options+=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3)
}

host() {  # host VERB ARGUMENT...: remote_job.sh there; 255 when the connection failed
    local words
    words=$(printf ' %q' "$1" "$REMOTE_DIR" "$run_id" "${@:2}")
    ssh "${ssh_options[@]}" -- "$HOST" "bash -s --$words" < scripts/remote_job.sh
}

# A file appears under its name when all of it is there, and what a cut left is used by the next attempt.
transfer() {
    rsync -rt --partial-dir=.rsync-partial --delay-updates -e "ssh ${ssh_options[*]}" "$@" 2> "$work/error"
}

push() {  # the code of the first start, and what a fresh machine lacks of the run
    transfer "$folder/remote/code/" "$HOST:$REMOTE_DIR/" &&
        transfer --ignore-existing --exclude=/remote/code --exclude=/remote/record --exclude=/remote/manifest \
            --exclude=/remote/exit_code "$folder/" "$HOST:$REMOTE_DIR/logs/$run_id/"
}

pull() {  # pull CHECKPOINT OPTION...: everything but older checkpoints; small files first, a cut must not keep them back
    local code=0 from="$HOST:$REMOTE_DIR/logs/$run_id"
    transfer "${@:2}" --exclude=/checkpoints --exclude='*.tmp' "$from/" "$folder/" || code=$?
    if [ "$code" -eq 0 ] && [ "$1" != - ]; then
        mkdir -p "$folder/checkpoints" && transfer "${@:2}" "$from/checkpoints/$1" "$folder/checkpoints/" || code=$?
        [ "$code" -ne 0 ] || drop_older_than "$1"
    fi
    case $code in
        0 | 23 | 24) working ;;     # 23, 24: the trainer replaced a file under our hands; verification has the last word
        3 | 11) no_room ;;
        *) trouble "the pull from $HOST broke off ($(why))"
            return 1 ;;
    esac
}

drop_older_than() {  # drop_older_than CHECKPOINT: a machine restored from an old snapshot must not cost us a newer one
    local file
    for file in "$folder"/checkpoints/step_*.safetensors; do
        if [[ ${file##*/} < $1 ]]; then rm "$file"; fi
    done
}

follow() {  # streams the log for PULL_EVERY seconds or until the job ends; the copy's length says where to go on
    local log=$folder/remote/job.log began=$SECONDS
    [ -e "$log" ] || : > "$log"
    host follow "$(($(wc -c < "$log") + 1))" "$PULL_EVERY" 2> /dev/null | tee -a "$log" || true
    [ $((SECONDS - began)) -ge 1 ] || sleep 1       # whatever ends it at once must not make us ask without a pause
}

why() { tail -n 1 "$work/error" | tr -d '\r'; }     # the last words of ssh or rsync

no_room() {
    trouble "cannot write to $folder ($(free_kb "$folder") kB free): nothing is lost on $HOST, free some space"
    return 1
}

in_the_way=""
trouble() { [ "$in_the_way" = "$1" ] || tell "$1; trying again every $PULL_EVERY s"; in_the_way=$1; }
working() { [ -z "$in_the_way" ] || tell "going on"; in_the_way=""; }

# ---- starting ---------------------------------------------------------------------------------------------------------

refuse_unsafe() {  # other runs that were started from here and have no verified copy yet
    local file id
    for file in "$LOG_DIR"/*/remote/record; do
        id=$(basename "${file%/remote/record}")
        if [ "$id" = "$run_id" ] || [ "$(recorded "$id" status)" != started ]; then continue; fi
        [ -n "$require_pull" ] || { tell "note: $id ($(recorded "$id" host)) is not safe here yet"; continue; }
        quit 5 "$id was started on $(recorded "$id" host) and is not safe here yet: give its command again first" \
            "(or delete $file to give the run up)"
    done
}

training_seconds() {  # of the run, as far as the knobs say
    local cap
    cap=$(knob "$knobs" MAX_WALLCLOCK_SECONDS)
    cap=${EXPECTED_SECONDS:-${cap:-600}}
    awk -v cap="$cap" 'BEGIN {exit !(cap > 0)}' || quit 6 "$run_id has no MAX_WALLCLOCK_SECONDS: with MAX_COST_USD give" \
        "EXPECTED_SECONDS, its training time"
    echo "$cap"
}

refuse_cost() {
    [ -n "$MAX_COST_USD" ] || return 0
    local seconds line
    seconds=$(training_seconds) || exit $?
    line=$(awk -v t="$seconds" -v o="$OVERHEAD_SECONDS" -v r="$USD_PER_HOUR" -v s="$(spent)" -v m="$MAX_COST_USD" 'BEGIN {
        cost = (t + o) * r / 3600
        verdict = s + cost > m ? "refused:" : "costs"
        printf "%s up to %.2f USD (%g + %g s at %g an hour); %.2f of %.2f are spent", verdict, cost, t, o, r, s, m}')
    [ "${line%%:*}" != refused ] || quit 6 "$run_id $line"
    tell "$run_id $line"
}

launch() {  # launch CHECKPOINT_ON_THE_HOST: starts the job, or starts it again; fails where the connection does
    local try=1
    [ "$1" != "$launched_from" ] || try=$((tries + 1))
    [ "$try" -le 2 ] || quit 1 "$run_id died twice without getting past checkpoint $1; set CHECKPOINT_EVERY"
    refuse_cost
    # The record comes first: a cut may hide from us that the job has started.
    { record_place && record status started && bill_start; } || no_room || return
    if ! { push && host start "$NPROC" "$REMOTE_PYTHON" "$PUSH_TO" 2> "$work/error"; }; then
        trouble "could not start $run_id on $HOST ($(why))"
        return 1
    fi
    launched_from=$1 tries=$try
    tell "$run_id runs on $HOST in $REMOTE_DIR"
}

leave_old_place() {  # before a run goes on at a new host: the old one must not run it or hold an end that is not here
    local old opts dir answer
    old=$(recorded "$run_id" host) opts=$(recorded "$run_id" ssh_opts) dir=$(recorded "$run_id" remote_dir)
    [ -n "$old" ] && [ "$old $opts $dir" != "$HOST $SSH_OPTS $REMOTE_DIR" ] || return 0
    answer=$(set_place "$old" "$opts" "$dir"; host status 2> /dev/null | tail -n 1) || answer=""
    case $answer in
        running* | ended*) quit 4 "$run_id is still on $old (${answer%% *}): give the command with that host" ;;
        died*) (set_place "$old" "$opts" "$dir"; pull "${answer##* }") ;;
        absent*) tell "$old has lost $run_id" ;;
        *) tell "$old does not answer" ;;
    esac
}

# ---- one run ----------------------------------------------------------------------------------------------------------

damaged() {  # damaged MANIFEST_SHA256: prints the files that are not the manifest's; nothing only when all are
    local manifest=$folder/remote/manifest found
    [ "$(sha256sum 2> /dev/null < "$manifest" | cut -d' ' -f1)" = "$1" ] || { echo remote/manifest; return; }
    found=$(cd "$folder" && sha256sum -c --quiet remote/manifest 2> /dev/null) ||
        sed 's/: FAILED.*//; s,^\./,,' <<< "${found:-the check itself failed}" | tr '\n' ' '
}

settle() {  # settle CODE MANIFEST_SHA256 CHECKPOINT: fails until the ended run is here and verified
    local bad status=stopped shown=0 log=$folder/remote/job.log
    [ ! -e "$log" ] || shown=$(wc -c < "$log")
    pull "$3" || return
    tail -c "+$((shown + 1))" "$log"
    bad=$(damaged "$2")
    if [ -n "$bad" ]; then
        tell "the copy differs from the host's manifest: ${bad% }; pulling again"
        pull "$3" --checksum || return
        bad=$(damaged "$2")
        [ -z "$bad" ] || { trouble "the copy still differs from the host's manifest: ${bad% }"; return 1; }
    fi
    if [ "$1" = 0 ] || [ "$1" = 3 ]; then
        status=complete
        grep -q ' \./summary\.json$' "$folder/remote/manifest" || status=stopped code="$1 and no summary.json"
    fi
    { bill_seen && record manifest "$2" && record exit_code "$1" && record status "$status"; } || no_room
}

report_end() {  # report_end CODE: what became of a settled run
    local files
    files="$(wc -l < "$folder/remote/manifest" | tr -d ' ') files verified in $folder"
    case $1 in
        0) tell "$run_id complete: $files" ;;
        3) tell "$run_id complete, OVER THE CAP (exit 3), not a valid submission: $files" ;;
        130 | 143) quit 8 "$run_id was stopped on $HOST by a signal: $files; the same command goes on from its checkpoint" ;;
        *) quit 1 "$run_id failed on $HOST with exit $1: $files; the end of remote/job.log says why" ;;
    esac
}

already_here() {  # the run was complete before, and its copy is as it was
    local bad
    [ "$(recorded "$run_id" status)" = complete ] || return 1
    bad=$(damaged "$(recorded "$run_id" manifest)")
    [ -n "$bad" ] || { tell "$run_id was complete before; RUN_ID=other after the recipe runs it again"; return 0; }
    tell "$run_id was complete, but its copy is damaged: ${bad% }"
    return 1
}

ask() {  # the host's answer into state, code, manifest, env and checkpoint; fails where there is none
    local answer rc=0
    answer=$(host status 2> "$work/error") || rc=$?
    if [ "$rc" -ne 0 ]; then
        [ -n "$before" ] || quit 4 "$HOST cannot be used: $(why)"
        trouble "no answer from $HOST ($(why))"
        return 1
    fi
    read -r state code manifest env checkpoint <<< "${answer##*$'\n'}"     # a login file may print something first
    [ "$env" = - ] || [ "$env" = "$(echo "$knobs" | sha256sum | cut -d' ' -f1)" ] ||
        quit 2 "RUN_ID=$run_id exists on $HOST with other knobs; choose another RUN_ID"
}

attend() {  # one run to its end, from wherever it stands
    local state code manifest env checkpoint launched_from="" tries=0 before
    before=$(recorded "$run_id" status)
    case $before in '' | stopped) refuse_unsafe ;; esac     # one that is unsafe itself may always go on
    while :; do
        ask || { sleep "$PULL_EVERY"; continue; }
        remember
        case $state in
            running)
                [ -n "$launched_from" ] || [ -n "$in_the_way" ] || tell "$run_id is running on $HOST: attending it"
                launched_from=${launched_from:-attended}
                bill_seen || true
                if pull "$checkpoint" --exclude=/remote/job.log; then follow; else sleep "$PULL_EVERY"; fi ;;
            ended)
                if [ "$before" = stopped ] && [ "$manifest" = "$(recorded "$run_id" manifest)" ]; then
                    tell "$run_id was stopped before: going on from $checkpoint"
                    launch "$checkpoint" || sleep "$PULL_EVERY"
                elif settle "$code" "$manifest" "$checkpoint"; then
                    break
                else
                    sleep "$PULL_EVERY"
                fi ;;
            died)
                tell "the job of $run_id died with its machine; its newest checkpoint there: $checkpoint"
                pull "$checkpoint" || true
                launch "$checkpoint" || sleep "$PULL_EVERY" ;;
            absent)
                [ "$before" != complete ] || quit 4 "$HOST no longer has $run_id, whose copy here is damaged"
                if [ -n "$before" ]; then
                    leave_old_place || { sleep "$PULL_EVERY"; continue; }
                    tell "$HOST has nothing of $run_id: starting it from the copy here"
                fi
                launch "$checkpoint" || sleep "$PULL_EVERY" ;;
            *) quit 4 "$HOST is busy with $code in $REMOTE_DIR: wait for it, or give its command" ;;
        esac
        [ -n "$before" ] || before=started
    done
    report_end "$code"
}

# ---- all runs -----------------------------------------------------------------------------------------------------------

select_run() { run_id=${run_ids[$1]} knobs=${knob_lists[$1]} folder=$LOG_DIR/${run_ids[$1]}; }

rehearse() {  # what the selected run would do
    tell "would copy train_gpt.py export.py requirements.txt scripts data/*.py to $HOST:$REMOTE_DIR"
    tell "would start there, detached: ${REMOTE_PYTHON:-.venv/bin/python} train_gpt.py, one process a GPU (NPROC=$NPROC)"
    tell "would pull logs/$run_id to $folder every $PULL_EVERY s and at the end, then verify its manifest"
    refuse_cost
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'tell "stopped here; a job on the host goes on, and the same command attends it again"; exit 130' INT
trap 'tell "stopped here; a job on the host goes on, and the same command attends it again"; exit 143' TERM HUP

require_pull="" run_ids=() knob_lists=() group=()
if [ "${1-}" = --require-pull ]; then
    require_pull=1
    shift
fi
[[ $# -ge 2 && $1 != -* && $2 != [A-Z]*=* ]] ||
    quit 2 "usage: bash scripts/remote_run.sh [--require-pull] HOST RECIPE [KNOB=value...] [RECIPE [KNOB=value...]]..."
check_settings
set_place "$1" "$SSH_OPTS" "$REMOTE_DIR"
for word in "${@:2}" ""; do         # the empty word closes the last group
    if [[ $word =~ ^[A-Z][A-Z0-9_]*= ]]; then
        group+=("$word")
    else
        [ ${#group[@]} -eq 0 ] || plan_run "${group[@]}"
        group=("$word")
    fi
done
for index in "${!run_ids[@]}"; do
    select_run "$index"
    check_run "$knobs"
done
for index in "${!run_ids[@]}"; do
    select_run "$index"
    tell "$run_id:" "$(tr '\n' ' ' <<< "$knobs")"
    if [ "$DRY_RUN" = 1 ]; then rehearse; elif ! already_here; then attend; fi
done
