"""Procedurally generated videos with questions: what memory can be measured with, without a download."""

from millpond.eval.streams.drawing import LEVELS, Level
from millpond.eval.streams.events import Event
from millpond.eval.streams.questions import QUESTION_TYPES, Question
from millpond.eval.streams.stream import FPS, SPLITS, Stream, generate

__all__ = ["FPS", "LEVELS", "QUESTION_TYPES", "SPLITS", "Event", "Level", "Question", "Stream", "generate"]
