"""`octavo completion`: the script that teaches a shell to complete octavo's commands, options and files.

Made by shtab from the very parser of the command line, so it knows what that knows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SHELLS = ("bash", "zsh", "fish")
_INSTALLING = """\
where a shell looks for it:
  octavo completion bash > ~/.local/share/bash-completion/completions/octavo
  octavo completion zsh > ~/.zfunc/_octavo      # with fpath+=~/.zfunc before compinit in ~/.zshrc
  octavo completion fish > ~/.config/fish/completions/octavo.fish
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo completion`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _INSTALLING
    parser.add_argument("shell", choices=SHELLS, help="whose script to print")


def main(args: argparse.Namespace) -> int:
    """`octavo completion`. Returns the exit status."""
    from octavo.cli import make_parser

    print(script(make_parser(), args.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of `parser` for one of `SHELLS`. Raises RuntimeError where shtab is missing."""
    try:
        import shtab
    except ImportError as error:
        raise RuntimeError('missing shtab; install with: pip install "octavo[completion]"') from error
    _complete_files(parser, {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY})
    return str(shtab.complete(parser, shell))


def _complete_files(parser: argparse.ArgumentParser, kinds: dict[str, dict[str, str]]) -> None:
    """Tell shtab which arguments are files or folders: those that are paths, as their metavar says."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, kinds)
        elif action.type is Path:
            action.complete = kinds["DIR" if action.metavar == "DIR" else "FILE"]  # type: ignore[attr-defined]
