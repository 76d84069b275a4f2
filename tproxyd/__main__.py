"""`python -m tproxyd`."""

import sys

from tproxyd.cli import main

sys.exit(main())
