"""How much communication a profile hides: of Nsight Systems (SQLite exports) or torch.profiler (Kineto JSON).

profile.py   what is read, in columns; nsys.py and kineto.py read it, reading.py tells which
intervals.py unions of intervals and what they cover;  nesting.py which range was open when
lanes.py     tells communication from compute;  peers.py who waited;  report.py sums it up
picture.py   draws it;  slim.py makes files small
"""

from overlap_mtp.profiling.overlap import Report, exposed_by_step, report_on
from overlap_mtp.profiling.read import read_profile
from overlap_mtp.profiling.trace import Profile, ProfileError

__all__ = ["Profile", "ProfileError", "Report", "exposed_by_step", "read_profile", "report_on"]
