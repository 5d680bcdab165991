"""`python -m trilobit`, and with it `torchrun … -m trilobit`."""

import sys

from trilobit.cli import main

if __name__ == "__main__":
    sys.exit(main())
