"""`python -m tokenlimits` is `tokenlimits`."""

import sys

from tokenlimits.cli import main

sys.exit(main())
