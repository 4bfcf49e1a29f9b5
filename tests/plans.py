"""The overrides of the CUDA launch plan that tests force, in one place (`ffi/plan.h` defines them).

Every plan must give the same bits. Small values of `candidates` make lists overflow with a few
hundred elements, `part` sets from which length on a row is shared by several CTAs, and `stages` how
many tiles are in flight while a row is streamed.
"""

PATHS = ("path=short", "path=sample", "path=exact")
CLUSTERS = tuple(f"cluster={size}" for size in (1, 2, 4, 8, 16))

PLANS = (
    "",
    *PATHS,
    *CLUSTERS,
    "candidates=4",
    "candidates=64",
    "part=1",
    "part=100000",
    "stages=1",
    "stages=2",
    "path=exact,cluster=8",
    "path=exact,cluster=3",
    "path=exact,cluster=1,stages=2",
    "path=sample,cluster=1",
    "path=sample,cluster=16,part=64",
    "path=sample,cluster=4,candidates=64",
)

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

# Lengths at which the kernel changes its way: the window that is copied (k, added by the tests), a
# tile of 384 threads with 1 to 7 vectors of four floats, two such tiles, parts of 2048, and powers
# of two.
BOUNDARIES = (1, 512, 1536, 2048, 3072, 4608, 6144, 7680, 9216, 10752, 12288, 21504, 24576, 32768)
