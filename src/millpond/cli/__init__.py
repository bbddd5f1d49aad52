"""The command line: `millpond VERB [--option]`.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 usage, 130 aborted. Knows how to read options, drive
a session and print; everything else is in the library, which never prints.
"""

from millpond.cli.main import app, main

__all__ = ["app", "main"]
