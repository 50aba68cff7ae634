"""``python -m cnnfast``."""

import sys

from cnnfast.cli import main

sys.exit(main())
