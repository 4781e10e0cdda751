"""`python -m spice_dist` is the command `spice-dist`."""

import sys

from spice_dist.cli import main

sys.exit(main())
