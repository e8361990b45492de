"""The laboratory's commands, as `octavo` finds them: entry points of the group ``octavo.commands``.

Each function adds a command's arguments to a parser and returns what runs the command. Its docstring is the help line.
What a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int]


def demo(parser: argparse.ArgumentParser) -> Run:
    """Convert a real sentence transformer to int8 and compare."""
    from . import demo as command

    command.add_arguments(parser)
    return command.main


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Measure perplexity, or embeddings, of a model by every scheme of the paper."""
    from . import eval as command

    command.add_arguments(parser)
    return command.main


def analyze(parser: argparse.ArgumentParser) -> Run:
    """Find the outlier features of a model, and what they carry."""
    from . import analysis as command

    command.add_arguments(parser)
    return command.main


def bench(parser: argparse.ArgumentParser) -> Run:
    """Time int8 layers against 16 and 32 bit, at given shapes or those of a model."""
    from . import bench as command

    command.add_arguments(parser)
    return command.main
