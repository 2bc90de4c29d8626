// Compiled once for each instruction set; HANOK_KERNELS names the table, HANOK_KEY and HANOK_NAME the
// instruction set.

#include "attention.h"
#include "elementwise.h"
#include "lora.h"
#include "pack.h"
#include "panels.h"
#if defined(__AVX512F__) || !defined(__x86_64__)
#include "dense.h"
#else
#include "gemm.h"
#endif

extern const Kernels HANOK_KERNELS = {HANOK_KEY, HANOK_NAME, kDenseTokens, dense,    product, pack, pack_codes, unpack,
                               look_up,   attend,     rms_norm,     rotate,   gate,    add,     copy,
                               widen_items, log_sum_exp, add_lora};
