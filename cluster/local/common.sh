# Functions that the scripts beside this file share; sourced, not run.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# The path of a program: of the repository's .venv where there is one, of PATH otherwise.
program() {
    if [ -x "$ROOT/.venv/bin/$1" ]; then
        printf '%s\n' "$ROOT/.venv/bin/$1"
    else
        command -v "$1" || die "$1 not found: run \`make install\` in $ROOT, or activate the environment that has it"
    fi
}

# require_free_port HOST PORT VARIABLE: ends the script when something listens there.
require_free_port() {
    local host=$1 port=$2 variable=$3
    case $port in
        '' | *[!0-9]*) die "$variable=$port is no port number" ;;
    esac
    if [ "$port" -lt 1 ] || [ "$port" -gt 65535 ]; then
        die "$variable=$port is no port number: 1 .. 65535"
    fi
    if [ "$host" = 0.0.0.0 ]; then
        host=127.0.0.1
    fi
    if (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; then
        die "port $port on $host is in use: stop what listens there, or set $variable to another port"
    fi
}

# private_folder FOLDER: creates it for this user alone, refuses another user's.
private_folder() {
    mkdir -p "$1" && chmod 700 "$1" && [ -O "$1" ] || die "$1 must be a folder that $(id -un) owns"
}
