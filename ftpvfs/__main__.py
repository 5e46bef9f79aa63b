"""`python -m ftpvfs`."""

import sys

from ftpvfs.cli import main

sys.exit(main())
