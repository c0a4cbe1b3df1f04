"""`python -m unimm`: the command line."""

from unimm.cli.main import main

if __name__ == "__main__":
    main()
