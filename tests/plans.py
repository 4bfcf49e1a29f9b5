"""The overrides of the CUDA launch plan that tests force, in one place (`ffi/plan.h` defines them).

The legal ones and the lengths at which the kernel changes its way are those of the fuzzer.
"""

from jax_topk.fuzz.plans import BOUNDARIES, CLUSTERS, PATHS, PLANS

__all__ = ["BOUNDARIES", "CLUSTERS", "ILLEGAL", "PATHS", "PLANS"]

ILLEGAL = {
    "path=fast": "path is one of auto, short, sample, exact",
    "cluster=17": "cluster is between 1 and 16",
    "cluster=0": "cluster is between 1 and 16",
    "candidates=3": "candidates is at least 4",
    "stages=3": "stages is 1 or 2",
    "speed=9": "the names are path, cluster, candidates, part, stages",
    "path": "write name=value",
    "cluster=two": "the value must be an integer",
    "path=exact,": "ends in a comma",
}
