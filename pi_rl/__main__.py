"""`python -m pi_rl` is the command `pi-rl`."""

import sys

from pi_rl.cli.main import main

sys.exit(main())
