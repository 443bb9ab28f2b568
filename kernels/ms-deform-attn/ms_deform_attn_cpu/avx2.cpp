// x86-64 with AVX2 and FMA; build.toml has the flags.
#if defined(__x86_64__)
#define MSDA_LANES 8
#define MSDA_KERNEL avx2_kernel
#define MSDA_NAME "AVX2"
#include "kernel.h"
#endif
