"""Procedurally generated videos with questions: what memory can be measured with, without a download."""

from millpond.streams.drawing import LEVELS, Level
from millpond.streams.events import Event
from millpond.streams.questions import FAMILIES, Question
from millpond.streams.stream import FPS, SPLITS, Stream, generate

__all__ = ["FAMILIES", "FPS", "LEVELS", "SPLITS", "Event", "Level", "Question", "Stream", "generate"]
