"""`python -m llmmpq` is the same as `llmmpq`."""

import sys

from llmmpq.cli import main

sys.exit(main())
