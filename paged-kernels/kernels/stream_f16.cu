#include "stream.cuh"

STREAM_KERNELS(F16)
