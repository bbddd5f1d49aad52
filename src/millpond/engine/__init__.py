"""Many sessions on one device: bytes shared out among them, hibernation, and one thread that runs the model for all."""

from millpond.engine.engine import Engine, EngineUsage
from millpond.engine.handle import EngineSession, Status

__all__ = ["Engine", "EngineSession", "EngineUsage", "Status"]
