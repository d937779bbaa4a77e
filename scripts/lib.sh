# shellcheck shell=bash
# Sourced by the launchers: go to the repository's root and make its virtual environment, once per requirements file.
# PYTHON chooses the interpreter (default python3), VENV the folder (default .venv).
#
# A launcher takes a recipe (a name in scripts/recipes/ or a file) and KNOB=value arguments. Arguments win over the
# environment, that over the recipe. It prints what it runs, as a command to copy; DRY_RUN=1 does no more than that.

CALLER=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}
KNOBS=()        # names of those that the launcher and its recipe set, in that order
RECIPE=''       # the file
QUIET=0         # 1 = print no commands
NAMES=''        # all knobs, once asked for

fail() {  # fail MESSAGE
    echo "error: $1" >&2
    exit 2
}

ensure_venv() {  # ensure_venv REQUIREMENTS_FILE
    local python=${PYTHON:-python3} stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$python is missing or older than Python 3.10; set PYTHON to a newer one"
    stamp="$VENV/.installed-$(cat requirements.txt "$1" | cksum | tr -d ' \n')"
    if [ ! -e "$stamp" ]; then
        echo "setup: installing $1 into $VENV"
        "$python" -m venv "$VENV" || exit 1
        # Byte code is made of what is imported, when it is: of all that is installed it takes as long as everything else.
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r "$1" || exit 1
        : > "$stamp"
    fi
}

# ----------------------------------------------------------------------------------------------------------------------
# Knobs: from the arguments, the environment, the recipe, the launcher's own defaults, in this order.
# ----------------------------------------------------------------------------------------------------------------------

default() {  # default KNOB VALUE: exports it unless the environment has a value
    [ -n "${!1:-}" ] || export "$1=$2"
    KNOBS+=("$1")
}

knob_names() {  # those of train_gpt.Config, one a line
    sed -nE 's/^    ([a-z0-9_]+): (int|float|str|bool) = knob\(.*/\1/p' train_gpt.py export.py | tr '[:lower:]' '[:upper:]'
}

need_knob() {  # need_knob NAME WHERE
    [ -n "$NAMES" ] || NAMES=$'\n'$(knob_names)$'\n'
    [[ $NAMES == *$'\n'"$1"$'\n'* ]] || fail "$2: $1 is not a knob of this version; README.md lists them"
}

load_recipe() {  # load_recipe FILE: exports its knobs; those that the environment has win. Lines as for scripts/recipe.py
    local recipe=$1 line name seen=' '
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%$'\r'}
        case $line in '#'*) continue ;; *[![:space:]]*) ;; *) continue ;; esac
        name=${line%%=*}
        if ! [[ $line =~ ^[A-Z][A-Z0-9_]*=([^[:space:]](.*[^[:space:]])?)?$ ]] || [[ $seen == *" $name "* ]]; then
            fail "$recipe: wanted KNOB=value, each knob once, no blanks around it, got: $line"
        fi
        seen+="$name "
        need_knob "$name" "$recipe"
        default "$name" "${line#*=}"
    done < "$1"
}

find_recipe() {  # find_recipe NAME|FILE: sets RECIPE
    local file known=()
    for file in "$CALLER/$1" "$1" "scripts/recipes/$1.env"; do
        if [ -f "$file" ]; then RECIPE=$file; return; fi
    done
    for file in scripts/recipes/*.env; do known+=("$(basename "$file" .env)"); done
    fail "recipe $1: no such file, and none of scripts/recipes/ (${known[*]})"
}

take_arguments() {  # take_arguments DEFAULT_RECIPE [RECIPE] [KNOB=value ...]
    local recipe=$1 argument given=''
    shift
    for argument in "$@"; do
        case $argument in
            -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "scripts/$(basename "$0")"; exit 0 ;;
            [A-Z]*=*)
                need_knob "${argument%%=*}" "$argument"
                export "${argument?}" ;;
            -* | *=*) fail "$argument: wanted a recipe or KNOB=value, --help explains" ;;
            *)
                [ -z "$given" ] || fail "two recipes, $given and $argument: wanted one"
                recipe=$argument given=$argument ;;
        esac
    done
    find_recipe "$recipe"
    load_recipe "$RECIPE"
}

name_run() {  # the recipe's name and the time, unless RUN_ID is set
    default RUN_ID "$(basename "$RECIPE" .env)_$(date +%Y%m%d_%H%M%S)"
}

# ----------------------------------------------------------------------------------------------------------------------
# What must be there, each said in one line.
# ----------------------------------------------------------------------------------------------------------------------

dry() { [ "${DRY_RUN:-0}" != 0 ]; }

need_data() {  # the shards and the tokenizer; else says the command that makes them
    local made
    default DATA_PATH ./data/datasets/fineweb10B_sp1024
    default TOKENIZER_PATH ./data/tokenizers/fineweb_1024_bpe.model
    dry && return
    case $DATA_PATH in
        */fineweb10B_*) made="fineweb --variant ${DATA_PATH##*_} --train-shards 80" ;;
        *) made="tokenize --docs DOCS.jsonl.xz --vocab ${VOCAB_SIZE:-1024} --val-docs 2000 --out $DATA_PATH" ;;
    esac
    compgen -G "$DATA_PATH/fineweb_train_*.bin" > /dev/null ||
        fail "no fineweb_train_*.bin in DATA_PATH=$DATA_PATH; make them: python data/prepare.py $made"
    [ -f "$TOKENIZER_PATH" ] || fail "TOKENIZER_PATH=$TOKENIZER_PATH is no file; python data/prepare.py $made makes it"
}

need_gpus() {  # need_gpus COUNT; DEVICE=cpu asks for none
    local found
    default DEVICE cuda
    if dry || [ "$DEVICE" = cpu ]; then return; fi
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        found=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .) || true
    else
        found=$( (nvidia-smi -L 2> /dev/null || true) | grep -c '^GPU ') || true
    fi
    [ "$found" -ge "$1" ] || fail "wanted $1 GPUs, found $found (nvidia-smi -L, CUDA_VISIBLE_DEVICES); DRY_RUN=1 only prints"
}

# ----------------------------------------------------------------------------------------------------------------------
# Steps.
# ----------------------------------------------------------------------------------------------------------------------

say() {  # say COMMAND...: prints it as the shell would take it
    [ "$QUIET" = 0 ] || return 0
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
}

step() {  # step COMMAND...: prints and runs it
    say "$@"
    dry || "$@"
}

last() {  # last COMMAND...: prints it and becomes it, so that signals reach it and its exit code is the launcher's
    say "$@"
    dry || exec "$@"
}

announce() {  # prints the knobs as the head of the command that follows: the recipe's, then others of the environment
    local name
    [ "$QUIET" = 0 ] || return 0
    echo "# recipe: $RECIPE"
    { printf '%s\n' "${KNOBS[@]}"; knob_names; } | awk '!seen[$0]++' | while IFS= read -r name; do
        [ -z "${!name+set}" ] || printf '%s=%q \\\n' "$name" "${!name}"
    done
}

train() {  # train COMMAND...: the launcher's end: environment, knobs, command
    dry || ensure_venv requirements.txt
    announce
    last "$@"
}

train_embedded() {  # from nothing to a scored artifact on the embedded corpus
    dry || ensure_venv requirements.txt
    export HF_HUB_OFFLINE=1
    step "$VENV/bin/python" data/prepare.py embedded
    announce
    step "$VENV/bin/python" train_gpt.py
    last "$VENV/bin/python" scripts/show_run.py "${LOG_DIR:-logs}/$RUN_ID"
}
