"""`python -m sab_hf …` is `sab-hf …`."""

import sys

from .cli import main

sys.exit(main())
