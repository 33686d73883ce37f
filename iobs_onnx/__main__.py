"""`python -m iobs_onnx` is the command line."""

import sys

from iobs_onnx.cli import main

sys.exit(main())
