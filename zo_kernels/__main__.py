"""`python -m zo_kernels` is the command line."""

import sys

from zo_kernels.cli import main

sys.exit(main())
