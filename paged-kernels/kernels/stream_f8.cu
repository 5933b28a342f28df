#include "stream.cuh"

STREAM_SCALED_KERNELS(F8)
