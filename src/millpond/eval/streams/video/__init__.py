"""Streams of real pixels: photographs and clips as grounds, pictures of named things as objects (the extra `streams`).

assets -> events -> questions, drawing -> stream -> baselines
"""

from millpond.eval.streams.video.levels import VIDEO_LEVELS, VideoLevel
from millpond.eval.streams.video.questions import VIDEO_QUESTION_TYPES, VideoQuestion
from millpond.eval.streams.video.stream import VideoStream, generate_video

__all__ = ["VIDEO_LEVELS", "VIDEO_QUESTION_TYPES", "VideoLevel", "VideoQuestion", "VideoStream", "generate_video"]
