"""`python -m torchnewton` is the command `torchnewton`."""

from torchnewton.cli import main

main()
