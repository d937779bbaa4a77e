# shellcheck shell=bash
# Sourced by the launchers: go to the repository's root and make its virtual environment, once per requirements file.
# PYTHON chooses the interpreter (default python3), VENV the folder (default .venv).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}

ensure_venv() {  # ensure_venv REQUIREMENTS_FILE
    local python=${PYTHON:-python3} stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: $python is missing or older than Python 3.10; set PYTHON to a newer one" >&2
        exit 2
    }
    stamp="$VENV/.installed-$(cat requirements.txt "$1" | cksum | tr -d ' \n')"
    if [ ! -e "$stamp" ]; then
        echo "setup: installing $1 into $VENV"
        "$python" -m venv "$VENV" || exit 1
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1" || exit 1
        : > "$stamp"
    fi
}

load_recipe() {  # load_recipe FILE: exports its knobs; those that the environment has already win
    local line name
    while IFS= read -r line || [ -n "$line" ]; do
        name=${line%%=*}
        case $line in
            '' | '#'*) ;;
            [A-Z]*=*) [ -n "${!name+set}" ] || export "$name=${line#*=}" ;;
            *) echo "error: $1 holds a line that is no KNOB=value: $line" >&2; exit 2 ;;
        esac
    done < "$1"
}
