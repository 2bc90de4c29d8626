"""`python -m hanok` is the `hanok` command."""

from hanok.cli.main import main

main()
