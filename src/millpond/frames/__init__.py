"""Where frames come from: files, cameras, networks, folders, pipes and arrays, as timestamped RGB pictures.

Knows nothing about models or memory. `open` gives a `Source`; `write_mp4` makes a file that `open` can read.
"""

from millpond.frames.frame import Frame
from millpond.frames.opening import open
from millpond.frames.source import Event, Losses, Source, SourceInfo
from millpond.frames.writer import write_mp4

__all__ = ["Event", "Frame", "Losses", "Source", "SourceInfo", "open", "write_mp4"]
