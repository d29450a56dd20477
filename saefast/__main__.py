"""`python -m saefast` is `saefast`."""

import sys

from saefast.cli import main

sys.exit(main())
