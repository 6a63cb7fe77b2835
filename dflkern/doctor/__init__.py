"""The doctor: from "the DFL loss is stuck" to the cause, and the line that repairs it.

`examine` looks at tensors, `watch` at a running training, `python -m dflkern doctor` at a file.
"""

from .examination import examine
from .findings import Finding, Level, Severity
from .report import Report
from .watching import Watch, watch

__all__ = ["Finding", "Level", "Report", "Severity", "Watch", "examine", "watch"]
