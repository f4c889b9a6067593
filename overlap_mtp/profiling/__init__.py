"""How much communication a profile hides: of Nsight Systems (SQLite exports) or torch.profiler (Kineto JSON).

`read` tells the format, and `nsys` or `kineto` reads it into a `trace`. `classify` tells communication from compute,
`overlap` sums both up with the help of `intervals`, `plot` draws them, and `shrink` makes files small.
"""

from overlap_mtp.profiling.overlap import report_on
from overlap_mtp.profiling.read import read_profile
from overlap_mtp.profiling.report import Report
from overlap_mtp.profiling.trace import Profile, ProfileError

__all__ = ["Profile", "ProfileError", "Report", "read_profile", "report_on"]
