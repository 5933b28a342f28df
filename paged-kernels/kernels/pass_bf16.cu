#include "pass.cuh"

PASS_KERNELS(Bf16)
