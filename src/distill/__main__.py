"""`python -m distill COMMAND ...` is `distill COMMAND ...`."""

import sys

from distill.cli import main

sys.exit(main())
