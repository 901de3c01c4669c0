"""`python -m benchmarks [NAME ...]`: run benchmarks, each as a process of its own, and write their
tables into benchmarks/RESULTS.md.

Each name has one section there, which tells its command, machine, versions, date and commit; the
sections of others stay as they are. Options after the one name go to that benchmark. A benchmark is
a module here whose `main(argv)` prints Markdown.
"""

import argparse
import ast
import itertools
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from maepretrain.files import replacing

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
# In the order of the file. Those that take hours run only when they are named.
NAMES = ("step", "gemm", "options", "loop", "startup", "data", "scaling", "order", "engines")
HOURS = ("accuracy",)
NEEDS = {"data": ("litdata", "skimage"), "loop": ("skimage",), "scaling": ("skimage",)}
PACKAGES = ("torch", "torchvision", "timm", "lightning")
TITLE = """# Results of the benchmarks

Written by `python -m benchmarks`; each section tells when and where it was measured.
"""


def machine() -> str:
    """CPU, cores and memory."""
    model, memory = platform.processor() or platform.machine(), ""
    try:  # Linux
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f", {size / 2**30:.0f} GiB"
    except (OSError, ValueError):
        pass
    return f"{model}, {os.cpu_count()} cores{memory}"


def commit() -> str:
    """The commit of the working tree, and whether anything but the results differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS}")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def about(name: str, argv: list[str]) -> str:
    """Command, machine, versions, date and commit of a run."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    return (
        f"`{' '.join(['python -m benchmarks', name, *argv])}`, {time.strftime('%Y-%m-%d')}, commit "
        f"{commit()}; {machine()}; Python {platform.python_version()}, {versions}."
    )


def purpose(name: str) -> str:
    """The first paragraph of a benchmark's docstring."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def with_section(text: str, name: str, body: str) -> str:
    """The file's text with the section of one benchmark replaced or added, in the order of NAMES;
    every other section stays as it is, byte by byte."""
    head, *sections = re.split(r"(?m)^(?=## )", text)
    found = {section[3:].partition("\n")[0].strip(): section for section in sections}
    found[name] = f"## {name}\n\n{body.strip()}\n\n"
    order = [*NAMES, *HOURS]
    names = sorted(found, key=lambda one: order.index(one) if one in order else len(order))
    sections = [found[one] for one in names]
    return (head or TITLE).rstrip() + "\n\n" + "".join(sections).rstrip() + "\n"


def run(name: str, argv: list[str]) -> str | None:
    """What a benchmark prints, in a process of its own; None where it fails."""
    missing = [one for one in NEEDS.get(name, ()) if find_spec(one) is None]
    if missing:
        print(f"{name} needs {', '.join(missing)}: pip install -e '.[bench]'", file=sys.stderr)
        return None
    done = subprocess.run(
        command(name, argv), cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False
    )
    return None if done.returncode else done.stdout


def command(name: str, argv: list[str]) -> list[str]:
    """What runs one benchmark."""
    return [sys.executable, "-m", f"benchmarks.{name}", *argv]


def main(argv: list[str], results: Path = RESULTS) -> int:
    """Run what is named, or all but what takes hours; write each section as soon as it is there.

    Returns:
        1 where a benchmark failed, whose section then stays as it was.
    """
    there = [name for name in (*NAMES, *HOURS) if (HERE / f"{name}.py").exists()]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(there))
    named = list(itertools.takewhile(lambda one: not one.startswith("-"), argv))
    more = argv[len(named) :]
    if not named:
        parser.parse_args(argv)
    names = named or [name for name in there if name not in HOURS]
    for name in names:
        if name not in there:
            parser.error(f"no benchmark {name}: choose from {', '.join(there)}")
    if more and len(names) > 1:
        parser.error(f"{' '.join(more)}: options go to one benchmark, which must be named")
    if {"-h", "--help"} & set(more):
        return subprocess.run(command(names[0], more), cwd=HERE.parent, check=False).returncode
    failed = []
    for name in names:
        print(f"{name}: {purpose(name)}", file=sys.stderr, flush=True)
        header = about(name, more)
        try:
            printed = run(name, more)
        except KeyboardInterrupt:
            print(f"stopped in {name}; what was written before it stays", file=sys.stderr)
            return 130
        if printed is None:
            failed.append(name)
            continue
        text = results.read_text() if results.exists() else ""
        body = f"{purpose(name)}\n\n{header}\n\n{printed}"
        with replacing(results) as file:
            file.write(with_section(text, name, body).encode())
        print(printed, flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}; their sections stay as they were", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
