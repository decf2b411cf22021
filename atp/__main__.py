"""`python -m atp ...`, the form that `accelerate launch -m atp train CONFIG.yaml` needs."""

import sys

from atp.cli import main

sys.exit(main())
