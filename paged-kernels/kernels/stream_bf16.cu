#include "stream.cuh"

STREAM_KERNELS(Bf16)
