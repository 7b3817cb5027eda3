#!/bin/sh
# Makes .venv and installs one of the lock files into it, unless that is done already. `make` calls it before every target.
# Usage: bootstrap.sh run | test     (PYTHON=… chooses the interpreter)
set -eu
cd "$(dirname "$0")/.."

case "${1:-}" in
    run) lock=requirements.lock ;;
    test) lock=requirements-test.lock ;;
    *) echo 'usage: bootstrap.sh run | test' >&2; exit 2 ;;
esac

say() { printf '%s\n' "$*" >&2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

chosen_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || { say "PYTHON=$PYTHON is not a Python 3.11 or newer."; return 1; }
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if is_new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    say 'Python 3.11 or newer is needed, and none was found on the PATH.'
    say 'Install one (Debian 12 and Ubuntu 24.04 or newer: apt-get install python3 python3-venv; Ubuntu 22.04: python3.11 python3.11-venv),'
    say 'or name it: make run PYTHON=/path/to/python3'
    return 1
}

# Debian keeps ensurepip in a package of its own; without it `python3 -m venv` fails halfway.
check_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 && return
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    say "Python $version is here, but its venv module is not complete. Type this, then try again:"
    if [ -e /etc/debian_version ]; then
        say "    apt-get install python$version-venv"
    else
        say "    your system's command to install venv and pip for Python $version"
    fi
    return 1
}

make_venv() {
    python=$(chosen_python)
    check_venv "$python"
    rm -rf .venv
    say "Making .venv with $("$python" --version)"
    "$python" -m venv .venv || { rm -rf .venv; say 'The virtual environment could not be made; see above.'; return 1; }
}

# A copied, moved or half-made environment is made again: its scripts name their interpreter by absolute path.
is_usable() { [ -f .venv/made-in ] && [ "$(cat .venv/made-in)" = "$PWD" ] && .venv/bin/python -c 'import pip' 2>/dev/null; }

is_usable || { make_venv; echo "$PWD" >.venv/made-in; }

fingerprint() { cat "$1" pyproject.toml | cksum; }
is_installed() { [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$(fingerprint "$2")" ]; }

# What the tests need holds all that a run needs.
if is_installed test requirements-test.lock || is_installed "$1" "$lock"; then exit 0; fi

say "Installing from $lock (once; again only when it or pyproject.toml changes)"
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r "$lock"
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
fingerprint "$lock" >".venv/installed-$1"
