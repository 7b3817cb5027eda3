#!/bin/sh
# Resolves pyproject.toml anew into the two lock files (`make lock`), for CPython 3.11 and later on every platform that has wheels.
# Hashes name the files; no index address is written, so that each machine installs from the registry it is set up for.
set -eu
cd "$(dirname "$0")/.."

tools=build/lock-tools
[ -x "$tools/bin/uv" ] || {
    "${PYTHON:-python3}" -m venv "$tools"
    "$tools/bin/python" -m pip install -qq --disable-pip-version-check 'uv>=0.9,<1'
}

# setuptools is not a dependency of ours: it builds the editable install, which happens without a network of its own.
compile() {
    echo 'setuptools>=77' | "$tools/bin/uv" pip compile pyproject.toml - --no-config --quiet --universal --python-version 3.11 \
        --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' "$@"
}
compile --upgrade --output-file requirements.lock
compile --upgrade --group test --group bench --constraint requirements.lock --output-file requirements-test.lock
if grep -nE '^ *--(index|extra-index|find-links|trusted-host)|://' requirements.lock requirements-test.lock; then
    echo 'A lock file names an address; see the lines above.' >&2
    exit 1
fi
