"""The graph passes stand alone: they need no runtime and no solver."""

import subprocess
import sys


def test_passes_import_neither_torch_nor_onnxruntime_nor_scipy():
    code = (
        "import sys, iobs_onnx.passes;"
        "print({'torch', 'onnxruntime', 'scipy', 'iobs_onnx.runtime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
