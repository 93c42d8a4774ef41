"""python -m hrpose."""

import sys

from hrpose.cli import main

sys.exit(main())
