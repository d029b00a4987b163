"""`python -m embedistill`."""

from embedistill.cli.commands import main

main()
