"""`python -m parity CASE...`: compare the library with stored outputs of the originals."""

import sys

from parity.runner import main

if __name__ == "__main__":
    sys.exit(main())
