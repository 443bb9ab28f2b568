// x86-64 with AVX-512; build.toml has the flags.
#if defined(__x86_64__)
#define MSDA_LANES 16
#define MSDA_KERNEL avx512_kernel
#define MSDA_NAME "AVX-512"
#include "kernel.h"
#endif
