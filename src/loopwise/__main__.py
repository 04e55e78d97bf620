"""`python -m loopwise` is the `loopwise` command."""

import sys

from loopwise.cli.main import main

sys.exit(main())
