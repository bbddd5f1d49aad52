"""What stands for a row and column of a token that lies on no frame's grid."""

TEXT = -1
"""Row and column of a token of a remembered turn."""
SEPARATOR = -2
"""Row and column of a frame's token that lies on no grid (a timestamp, a newline)."""
