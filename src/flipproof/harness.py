"""``python -m flipproof.harness`` is lm-eval's own command line, with flipproof as one of its models."""

import sys

from flipproof.measure.harness import main

if __name__ == "__main__":
    sys.exit(main())
