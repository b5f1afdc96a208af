"""Makes `python -m miniphi` the same as the `miniphi` command."""

import sys

from miniphi.cli.main import main

sys.exit(main())
