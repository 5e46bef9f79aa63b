"""`python -m ftpvfs.config README.md` writes the reference of the options into the README."""

import sys

from ftpvfs.config.reference import main

sys.exit(main(sys.argv[1:]))
