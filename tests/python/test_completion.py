"""octavo completion: the shells themselves complete what a test types.

bash and zsh run on a terminal of their own. `octavo` is a function there that prints its arguments, so what it prints
after a line with tabs is what the shell made of them. fish tells its completions when asked.
"""

from __future__ import annotations

import functools
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("shtab", reason="octavo completion makes its scripts with shtab, which is not installed")

from octavo import cli, completion

COMMANDS = ["analyze", "bench", "completion", "demo", "eval", "info", "inspect", "plan", "quantize", "report"]
TIMEOUT = 60  # seconds, on a machine that does other things too

# What is typed, and the arguments that arrive.
CASES = [
    ("quan\t", ["quantize"]),
    ("comp\tzs\t", ["completion", "zsh"]),
    ("quantize --gran\t", ["quantize", "--granularity"]),
    ("quantize --granularity v\t", ["quantize", "--granularity", "vector"]),
    ("inspect weights-of-\t", ["inspect", "weights-of-a-model.safetensors"]),
    ("quantize model-f\t out --calibrate text-o\t", ["quantize", "model-folder", "out", "--calibrate", "text-of.txt"]),
    ("plan model-f\t", ["plan", "model-folder"]),
    ("bench --dtypes bf\t", ["bench", "--dtypes", "bfloat16"]),
    ("eval m --text te\t", ["eval", "m", "--text", "text-of.txt"]),
    ("eval m --plots mod\t", ["eval", "m", "--plots", "model-folder"]),
    ("no-such-comm\t", ["no-such-comm"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files and a folder to be completed, each by its first letters."""
    (tmp_path / "weights-of-a-model.safetensors").touch()
    (tmp_path / "text-of.txt").touch()
    (tmp_path / "model-folder").mkdir()
    return tmp_path


@functools.cache
def printed(shell: str) -> str:
    """The script as a user gets it."""
    command = [sys.executable, "-m", "octavo.cli", "completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def script(folder: Path, shell: str) -> Path:
    """The script, in a file as the shell wants it to be named."""
    scripts = folder.with_name(folder.name + "-scripts")
    scripts.mkdir(exist_ok=True)
    path = scripts / {"bash": "octavo", "zsh": "_octavo", "fish": "octavo.fish"}[shell]
    path.write_text(printed(shell))
    return path


def needs(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"no {shell} to complete in: apt install {shell}")
    return found


class Terminal:
    """An interactive shell on a terminal of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        pid, self._file = pty.fork()
        if pid == 0:
            environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "LC_ALL": "C"}
            os.chdir(folder)
            os.execve(command[0], command, environment)
        self._pid = pid

    def type(self, keys: str, until: str) -> re.Match[str]:
        """Types, and reads what is shown until the pattern appears."""
        os.write(self._file, keys.encode())
        shown, end = "", time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if select.select([self._file], [], [], 0.1)[0]:
                shown += os.read(self._file, 4096).decode(errors="replace")
                match = re.search(until, shown)
                if match:
                    return match
        raise AssertionError(f"after {keys!r} expected {until!r}, got {shown!r}")

    def close(self) -> None:
        os.close(self._file)  # hangs up
        os.waitpid(self._pid, 0)


def bash(folder: Path) -> Terminal:
    terminal = Terminal([needs("bash"), "--norc", "--noprofile", "-i"], folder)
    terminal.type(f"source {script(folder, 'bash')}; echo rea''dy\n", "ready")
    terminal.type("octavo() { printf 'GOT'; printf ' [%s]' \"$@\"; echo ' .'; }; echo set; echo do''ne\n", "done")
    return terminal


def zsh(folder: Path) -> Terminal:
    terminal = Terminal([needs("zsh"), "-f", "-i"], folder)
    path = script(folder, "zsh")
    terminal.type(f"unsetopt zle_bracketed_paste; fpath=({path.parent} $fpath); echo rea''dy\n", "ready")
    terminal.type(f"autoload -Uz compinit; compinit -u -d {path.parent}/dump; echo lo''aded\n", "loaded")
    terminal.type("octavo() { printf 'GOT'; printf ' [%s]' \"$@\"; echo ' .'; }; echo do''ne\n", "done")
    return terminal


@pytest.mark.parametrize("open_terminal", [bash, zsh], ids=["bash", "zsh"])
def test_typed_lines_are_completed(folder: Path, open_terminal: object) -> None:
    assert callable(open_terminal)
    terminal = open_terminal(folder)
    try:
        for typed, expected in CASES:
            found = terminal.type(f"octavo {typed}\n", r"GOT((?: \[[^\]]*\])*) \.")
            # Some shells leave the slash after a folder, some take it away again.
            assert [word.rstrip("/") for word in re.findall(r"\[([^\]]*)\]", found[1])] == expected, typed
    finally:
        terminal.close()


def candidates_of_bash(folder: Path, words: list[str]) -> list[str]:
    """What bash's completion offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"""
source {script(folder, "bash")}
function_name=$(complete -p octavo | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
$function_name
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    result = subprocess.run(
        [needs("bash"), "--norc", "-c", code], capture_output=True, text=True, check=True, cwd=folder, timeout=TIMEOUT
    )
    assert result.stderr == ""
    return result.stdout.split()


def candidates_of_fish(folder: Path, words: list[str]) -> list[str]:
    line = " ".join(words)
    result = subprocess.run(
        [needs("fish"), "--no-config", "-c", f"source {script(folder, 'fish')}; complete -C '{line}'"],
        capture_output=True, text=True, check=True, cwd=folder, timeout=TIMEOUT,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )  # fmt: skip
    assert result.stderr == ""
    return [line.partition("\t")[0] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("candidates", [candidates_of_bash, candidates_of_fish], ids=["bash", "fish"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], COMMANDS),
        (["in"], ["info", "inspect"]),
        (["quantize", "--out"], ["--outlier-columns", "--outliers"]),
        (["quantize", "--scheme", ""], ["absmax", "zeropoint"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["inspect", "wei"], ["weights-of-a-model.safetensors"]),
        (["quantize", "m", "out", "--calibrate", "tex"], ["text-of.txt"]),
        (["info", "--gran"], []),
    ],
)
def test_candidates(folder: Path, candidates: object, words: list[str], expected: list[str]) -> None:
    assert callable(candidates)
    assert sorted(candidates(folder, ["octavo", *words])) == expected


def test_every_command_and_option_is_in_every_script() -> None:
    """The scripts are made from the parser: nothing has to be listed twice, nothing can be forgotten."""
    commands = next(action for action in cli.make_parser()._actions if action.dest == "command").choices
    assert isinstance(commands, dict)
    assert sorted(commands) == COMMANDS
    for shell in completion.SHELLS:
        text = completion.script(cli.make_parser(), shell)
        for name, command in commands.items():
            assert name in text
            for option in (option for action in command._actions for option in action.option_strings):
                assert option.lstrip("-") in text, (shell, name, option)


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == 'octavo completion: missing shtab; install with: pip install "octavo[completion]"\n'


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["completion", "tcsh"])
    assert exit_info.value.code == 2
    assert "octavo completion: error: " in capsys.readouterr().err
