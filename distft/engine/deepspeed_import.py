"""Imports DeepSpeed without MLflow, which its autotuner would import where it is there: 1 s of each start."""

import sys

_UNUSED = "mlflow"
_is_new = _UNUSED not in sys.modules
if _is_new:
    sys.modules[_UNUSED] = None  # type: ignore[assignment]  # an import of it fails, as if it were not there
try:
    import deepspeed
finally:
    if _is_new:
        del sys.modules[_UNUSED]

__all__ = ["deepspeed"]
