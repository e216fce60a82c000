#!/bin/sh
# Sets up .venv for `make demo` (the program), `make docs` (the site) or `make test` (tests, linters, training), in the
# versions of constraints.txt. System packages: as root on Debian it installs them, else it prints their names.
# Safe to run again: it does nothing where the last installation is up to date.
set -eu
cd "$(dirname "$0")/.."
what=${1:-demo}

case $what in
demo) extras="" packages="libportaudio2" ;;
test) extras="[dev,train]" packages="libportaudio2 pulseaudio pulseaudio-utils libasound2-plugins chromium" ;;
docs) extras="[docs]" packages="" ;;
*) echo "setup.sh: expected demo, docs or test, got $what" >&2 && exit 2 ;;
esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "setup.sh: Python 3.11 or newer is needed as $python; set PYTHON to another" >&2
    exit 2
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3-venv"

missing=""
if command -v dpkg-query >/dev/null 2>&1; then
    for package in $packages; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
    done
    if [ -n "$missing" ] && [ "$(id -u)" = 0 ]; then
        echo "setup.sh: installing$missing"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
            echo "setup.sh: not all of$missing could be installed; tests that need them are skipped" >&2
    elif [ -n "$missing" ]; then
        echo "setup.sh: for microphones$([ "$what" = test ] && echo ' and the tests of devices and the live page') install:$missing" >&2
    fi
else
    echo "setup.sh: not a Debian system; you may need what Debian calls $packages" >&2
fi

# npm's packages for the tests of the JavaScript client, in .setup/javascript
packages=docs/clients/package.json
if [ "$what" = test ] && ! cmp -s $packages .setup/javascript/package.json; then
    rm -rf .setup/javascript
    mkdir -p .setup/javascript.new
    cp $packages .setup/javascript.new
    if command -v npm >/dev/null 2>&1 &&
        npm install --prefix .setup/javascript.new --no-package-lock --no-audit --no-fund --silent; then
        mv .setup/javascript.new .setup/javascript
    else
        rm -rf .setup/javascript.new
        echo "setup.sh: npm cannot install $packages; the tests of the JavaScript client are skipped" >&2
    fi
fi

# pipecat-ai and livekit-agents for the tests of the adapters, in .setup/agents, with what the program needs beside their
# ONNX Runtime; pipecat-ai wants an older protobuf
if [ "$what" = test ]; then
    wanted=$("$python" - <<'EOF'
import tomllib
def project(path):
    return tomllib.load(open(path, "rb"))["project"]
extras = project("packaging/client/pyproject.toml")["optional-dependencies"]
needed = [r for r in project("pyproject.toml")["dependencies"] if "onnxruntime" not in r]
print(*needed, *extras["pipecat"], *extras["livekit"], sep="\n")
EOF
    )
    if [ "$(cat .setup/agents/wanted.txt 2>/dev/null)" != "$wanted" ]; then
        rm -rf .setup/agents
        mkdir -p .setup
        if "$python" -m venv .setup/agents && echo "$wanted" >.setup/agents/required.txt &&
            grep -v '^protobuf=' constraints.txt >.setup/agents/constraints.txt &&
            .setup/agents/bin/python -m pip install --quiet --disable-pip-version-check \
                --constraint .setup/agents/constraints.txt --requirement .setup/agents/required.txt; then
            mv .setup/agents/required.txt .setup/agents/wanted.txt
        else
            rm -rf .setup/agents
            echo "setup.sh: pip cannot install pipecat-ai and livekit-agents; the tests of the adapters are skipped" >&2
        fi
    fi
fi

# `test` installs all that `docs` needs
[ "$what" = docs ] && [ -f .venv/.installed-test ] && what=test extras="[dev,train]"
stamp=".venv/.installed-$what"
constraints=${CONSTRAINTS:-constraints.txt}
[ -f "$stamp" ] && cat pyproject.toml "$constraints" | cmp -s - "$stamp" && exit 0
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$@"; }
pip --editable ".$extras"
# tests compare with the wrapper in silero-vad; of that package's dependencies they need only torch
[ "$what" != test ] || pip --no-deps "silero-vad>=6.2,<7"
cat pyproject.toml "$constraints" >"$stamp"
