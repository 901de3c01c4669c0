#!/usr/bin/env bash
# The README's test line with the oldest torch and torchvision that pyproject.toml admits, in a fresh
# environment: pip takes the newest by itself, so nothing else shows that the bounds are true.
#
#     scripts/lower_bound.sh [PYTHON [PYTEST ARGUMENT...]]
#
# PYTHON is an interpreter of 3.11 or later, by its name or whole path (default: python3); what
# follows it goes to pytest. Took 35 minutes, 12 of them to install, on two cores that much else
# shared (14 minutes of CPU time), and 12 GB of $TMPDIR. PIP_NO_CACHE_DIR=1 keeps the wheels out of
# pip's cache.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}") || { echo "no interpreter ${1:-python3}" >&2; exit 2; }
shift || true
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# tomllib is why PYTHON reads them: the script needs no other tool, and no number is written twice.
"$python" - > "$work/oldest.txt" <<'END'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    lines = tomllib.load(file)["project"]["dependencies"]
bounds = (re.match(r"(torch|torchvision)\s*>=\s*([\w.]+)", line) for line in lines)
oldest = dict(bound.groups() for bound in bounds if bound)
assert oldest.keys() == {"torch", "torchvision"}, f"pyproject.toml bounds only {oldest}"
print(*(f"{name}=={version}" for name, version in oldest.items()), sep="\n")
END
cat "$work/oldest.txt"
# A constraint, not a second install: pip settles all packages at once, as it does for a user.
export PIP_CONSTRAINT=$work/oldest.txt
# The README's own line, with PYTHON and an environment beside the checkout's .venv, which is kept.
line=$(grep --max-count=1 'bin/pytest' README.md)
line=${line/python3/\"$python\"}
line=${line//.venv/\"$work/venv\"}
echo "+ $line $*"
bash -euo pipefail -c "$line \"\$@\"" bash "$@"
