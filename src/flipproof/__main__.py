"""``python -m flipproof`` is ``flipproof``; torchrun wants a module."""

import sys

from flipproof.cli import main

sys.exit(main())
