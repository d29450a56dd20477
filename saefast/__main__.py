"""`python -m saefast` is `saefast`."""

import sys

from saefast.cli.main import main

sys.exit(main())
