"""Serving: many requests at once on one base, each with its own adapter; knows nothing of HTTP."""

from jlora.serving.engine import Engine
from jlora.serving.request import Closed, Finished, QueueFull, Request, State, Token, UnknownAdapter
from jlora.serving.store import AdapterStore

__all__ = ["AdapterStore", "Closed", "Engine", "Finished", "QueueFull", "Request", "State", "Token", "UnknownAdapter"]
