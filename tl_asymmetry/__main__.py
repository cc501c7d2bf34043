"""`python -m tl_asymmetry` is the command line."""

import sys

from tl_asymmetry.cli import main

sys.exit(main())
