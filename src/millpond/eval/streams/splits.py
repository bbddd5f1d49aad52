"""What every kind of generated stream has in common: its pace, and which streams belong together."""

FPS = 2.0
"""Frames per second; a temporal group is two frames, one second."""
FRAMES_A_GROUP = 2
SPLITS = {"train": 0, "validation": 1, "test": 2}
"""Splits share no stream (the split is part of every seed), no image of a handwritten digit, no ground and no picture."""
