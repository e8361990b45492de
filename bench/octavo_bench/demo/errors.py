"""What stops the demo. In a module of its own, so that it can be named before torch is loaded."""

from __future__ import annotations


class DemoError(RuntimeError):
    """The demo cannot run; the message says why, in one line."""


class TooFewSentencesError(DemoError):
    """This Python installation carries too little documentation."""


class ModelError(DemoError):
    """The pinned weights are absent, or they are not the pinned ones."""


class WrongResultError(DemoError):
    """A model that was to be timed does not compute the embeddings."""
