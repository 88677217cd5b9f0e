"""``python -m flipproof`` is ``flipproof``; torchrun wants a module."""

import sys

from flipproof.cli.main import main

sys.exit(main())
