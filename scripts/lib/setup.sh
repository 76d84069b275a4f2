# What scripts/demo and scripts/test share: root, Debian packages, the virtual environment.
#
# Sourced, after `set -euo pipefail`. Each function looks first and does nothing when nothing is
# missing, so that a second run starts at once. Where packages come from (mirrors, proxies, an
# index of wheels) is the machine's own apt and pip configuration; nothing here overrides it.

# Debian's interpreter, which need_packages sees to: another one that stands before it on the PATH may
# be built without optimisation (a shared libpython costs a fifth of the connections per second).
PYTHON=/usr/bin/python3

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
VENV="$ROOT/.venv"

die() {
    echo "$*" >&2
    exit 1
}

need_root() {
    [[ $EUID -eq 0 ]] && return
    die "can't build network namespaces: not root; try: sudo scripts/$(basename "$0")"
}

# need_packages NAME...: the Debian packages that are not installed yet, installed.
need_packages() {
    command -v dpkg-query >/dev/null || die "can't look for $*: this is no Debian; install them yourself"
    local missing=() name
    for name; do
        [[ $(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || missing+=("$name")
    done
    ((${#missing[@]})) || return 0
    echo "# installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -q -y --no-install-recommends "${missing[@]}"; } >&2
}

# need_servers NAME...: the same for servers, which are wanted in namespaces only: Debian would start
# them as soon as they are installed.
need_servers() {
    local policy=/usr/sbin/policy-rc.d
    if [[ -e $policy ]]; then
        need_packages "$@"
        return
    fi
    (
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        need_packages "$@"
    )
}

# need_venv [dev]: .venv with this checkout (editable) in it, and with `dev` the group of that name.
# Redone only when pyproject.toml, the constraints or the interpreter are others than last time.
need_venv() {
    local group="${1:-}" stamp want have="" extra=()
    stamp="$VENV/.installed${group:+-$group}"
    want="$(cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" | sha256sum) $($PYTHON -V) $ROOT"
    [[ -r $stamp ]] && have="$(<"$stamp")"
    [[ $have == "$want" && -x $VENV/bin/tproxyd ]] && return

    $PYTHON -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "can't use $($PYTHON -V): tproxyd needs Python 3.11 or newer"
    echo "# preparing ${VENV#"$PWD"/}" >&2
    $PYTHON -m venv --clear "$VENV"
    if [[ $group ]]; then # pip 23 has no --group
        mapfile -t extra < <($PYTHON -c '
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["dependency-groups"][sys.argv[2]], sep="\n")
' "$ROOT/pyproject.toml" "$group")
    fi
    # In the environment, not as -c: so it holds for the isolated build of this package as well.
    PIP_CONSTRAINT="$ROOT/scripts/constraints.txt" \
        "$VENV/bin/pip" install -qq --disable-pip-version-check -e "$ROOT" "${extra[@]}" >&2
    echo "$want" >"$stamp"
    [[ $group ]] && echo "$want" >"$VENV/.installed"
    return 0
}

PACKAGES=(python3 python3-venv iproute2 nftables libnftables1)
