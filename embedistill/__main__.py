"""`python -m embedistill`."""

from embedistill.cli import main

main()
