"""`python -m chaos [seconds=120] [seed=7] [runs=1]`: see `run`."""

import sys

from chaos.run import main

sys.exit(main(sys.argv[1:]))
