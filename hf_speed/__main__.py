"""`python -m hf_speed` is `hf-speed`."""

import sys

from hf_speed.cli import main

if __name__ == "__main__":
    sys.exit(main())
