"""The peak of this process's resident memory."""

import sys

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak() -> int:
    """The most bytes that were resident so far. Ends the program where the system does not tell."""
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if found is None:
        name = sys.argv[0].rpartition("/")[2]
        sys.exit(f"{name}: this system does not tell the peak of memory; use a GPU, Linux or macOS")
    return int(found)
