"""`python -m tokenlimits`: the command line, `tokenlimits`."""

import sys

from tokenlimits.cli import main

sys.exit(main())
