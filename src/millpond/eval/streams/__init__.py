"""Generated videos with questions: what memory can be measured with, without a download."""

from millpond.eval.streams.any_level import generate_any
from millpond.eval.streams.drawing import LEVELS, Level
from millpond.eval.streams.events import Event
from millpond.eval.streams.questions import QUESTION_TYPES, Question
from millpond.eval.streams.splits import FPS, SPLITS
from millpond.eval.streams.stream import Stream, generate
from millpond.eval.streams.video import VIDEO_LEVELS, VIDEO_QUESTION_TYPES, VideoStream, generate_video

__all__ = [
    "FPS",
    "LEVELS",
    "QUESTION_TYPES",
    "SPLITS",
    "VIDEO_LEVELS",
    "VIDEO_QUESTION_TYPES",
    "Event",
    "Level",
    "Question",
    "Stream",
    "VideoStream",
    "generate",
    "generate_any",
    "generate_video",
]
