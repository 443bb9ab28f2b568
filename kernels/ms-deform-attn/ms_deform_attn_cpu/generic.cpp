// Any processor: four lanes are SSE2 on x86-64 and NEON on 64-bit Arm.
#define MSDA_LANES 4
#define MSDA_KERNEL generic_kernel
#define MSDA_NAME "generic"
#include "kernel.h"
