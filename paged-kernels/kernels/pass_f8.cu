#include "pass.cuh"

PASS_KERNELS(F8)
